"""Where results go: buffers that outlive a batch, as page faults of fresh memory cost more than the sums do.

Gradients run through no buffer: what they run through is kept until the backward pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Rooms(Protocol):
    """Gives room for results."""

    def take(self, name: Hashable, shape: Sequence[int]) -> Tensor | None:
        """Room for one, with whatever is in it; None for memory of its own."""


class NoBuffers:
    """Every result gets memory of its own, through which gradients run."""

    def take(self, name: Hashable, shape: Sequence[int]) -> None:
        """None: memory of its own."""


class Buffers:
    """Named buffers that are used again.

    Args:
        like: Gives dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[Hashable, Tensor] = {}

    def take(self, name: Hashable, shape: Sequence[int]) -> Tensor:
        """A buffer of a shape, with whatever is in it; valid until the same name is taken again."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._like.new_empty(size)
            self._buffers[name] = buffer
        return buffer[:size].view(*shape)

    def clear(self) -> None:
        """Free all buffers; on a GPU for the sizes that come next, not only for these."""
        self._buffers.clear()
        if self._like.device.type == "cuda":
            torch.cuda.empty_cache()
