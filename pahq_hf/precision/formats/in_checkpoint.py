"""A weight that stays where it is: in the checkpoint, read when it is wanted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pahq_hf.precision.fp32.source import SourceBlock


class CheckpointWeight(nn.Module):
    """A matrix read from the mapped checkpoint, which is checked for changes at every use.

    Args:
        block: Where it is.
        shape: Rows (out) and columns (in).
        device: Where its values go.
    """

    def __init__(self, block: SourceBlock, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self._block = block
        self._shape = shape
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)  # follows `to`

    place: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (out) and columns (in)."""
        return self._shape

    @property
    def nbytes(self) -> int:
        """None are resident: pages of the mapped file can be dropped at any time."""
        return 0

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The values of a block, in FP32. [rows, cols]

        Raises:
            ModelLoadError: If the checkpoint is gone or changed.
        """
        return self._block.read(rows, cols).to(self.place.device, torch.float32)
