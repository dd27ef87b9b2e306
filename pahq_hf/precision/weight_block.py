"""Blocks of weight matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightBlock:
    """A block of a weight matrix: half-open row (output) and column (input) ranges."""

    rows: slice
    cols: slice

    @property
    def size(self) -> int:
        """Elements."""
        return (self.rows.stop - self.rows.start) * (self.cols.stop - self.cols.start)

    def intersect(self, other: WeightBlock) -> WeightBlock | None:
        """The common block, or None."""
        rows = slice(max(self.rows.start, other.rows.start), min(self.rows.stop, other.rows.stop))
        cols = slice(max(self.cols.start, other.cols.start), min(self.cols.stop, other.cols.stop))
        return WeightBlock(rows, cols) if rows.start < rows.stop and cols.start < cols.stop else None

    def within(self, outer: WeightBlock) -> tuple[slice, slice]:
        """This block's index relative to a block that contains it."""
        r, c = outer.rows.start, outer.cols.start
        return (
            slice(self.rows.start - r, self.rows.stop - r),
            slice(self.cols.start - c, self.cols.stop - c),
        )


Layout = Sequence[tuple[WeightBlock, str]]  # blocks that make up a matrix, and their formats
