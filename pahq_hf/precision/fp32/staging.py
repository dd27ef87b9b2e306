"""FP32 weights on their way from the checkpoint to a product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pahq_hf.precision.fp32.source import SourceBlock
from pahq_hf.precision.fp32.transfer import Transfer


class Staging:
    """One buffer for FP32 weights on their way to a product; the next ones are read ahead meanwhile."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._last: SourceBlock | None = None
        self._after: dict[tuple[str, tuple[tuple[int, int], ...]], SourceBlock] = {}
        self._transfers: dict[torch.device, Transfer] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Staging:
        """One that expects the same, without memory: what is under way belongs to this one."""
        other = Staging()
        other._last, other._after = self._last, dict(self._after)
        return other

    def forget(self) -> None:
        """Drop what was sent ahead and not used."""
        for transfer in self._transfers.values():
            transfer.forget()

    def transfer(self, device: torch.device) -> Transfer | None:
        """What copies weights to a GPU ahead of their use; None for the CPU."""
        if device.type != "cuda":
            return None
        if device not in self._transfers:
            self._transfers[device] = Transfer(device)
        return self._transfers[device]

    def expect(self, block: SourceBlock) -> None:
        """Say that a projection comes after the one named before, in the order of a forward pass."""
        if self._last is not None:
            self._after[self._last.name, self._last.segments] = block
        self._last = block

    def _announce(self, block: SourceBlock) -> None:
        """Say that a projection is being read: the one after it comes into memory in the background."""
        following = self._after.get((block.name, block.segments))
        if following is not None:
            following.prefetch()

    def stage(self, block: SourceBlock, rows: slice, cols: slice, device: torch.device) -> Tensor:
        """Values of a projection in FP32, for use at once and for reading only.

        Args:
            block: Where they lie.
            rows: Rows.
            cols: Columns.
            device: Where they are used.

        Returns:
            On a CPU, where they cannot be used as they lie in the file, they are in the buffer: valid until
            the next call. [rows, cols]
        """
        self._announce(block)
        views = list(block.views(rows, cols))
        if device.type != "cpu":  # as they lie in the file, often in BF16: a GPU widens them in no time
            arrived = [view.to(device).to(torch.float32) for view in views]
            return arrived[0] if len(arrived) == 1 else torch.cat(arrived)
        if len(views) == 1 and views[0].dtype == torch.float32 and views[0].is_contiguous():
            return views[0]
        values = self._take(sum(view.shape[0] for view in views), views[0].shape[1])
        offset = 0
        for view in views:
            values[offset : offset + view.shape[0]] = view
            offset += view.shape[0]
        return values

    def _take(self, rows: int, cols: int) -> Tensor:
        """Room for a matrix, in the same memory every time. [rows, cols]"""
        if self._buffer.numel() < rows * cols:
            self._buffer = torch.empty(rows * cols)
        return self._buffer[: rows * cols].view(rows, cols)

    def free(self) -> None:
        """Give the memory back."""
        self._buffer = torch.empty(0)
