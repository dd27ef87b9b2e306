"""A weight whose blocks are kept in different formats."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from pahq_hf.precision.formats.registry import LowWeight, quantize
from pahq_hf.precision.weight_block import Layout, WeightBlock


class MixedWeight(nn.Module):
    """Low-precision blocks that make up one matrix.

    Args:
        weight: Full-precision weight. [out, in]
        layout: Its blocks and their formats.
    """

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        super().__init__()
        self._regions = [region for region, _ in layout]
        blocks = [cast(nn.Module, quantize(weight[r.rows, r.cols].contiguous(), fmt)) for r, fmt in layout]
        self._blocks = nn.ModuleList(blocks)
        self._shape = (weight.shape[0], weight.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (out) and columns (in)."""
        return self._shape

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(cast(LowWeight, block).nbytes for block in self._blocks)

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The stored values of a block, in FP32. [rows, cols]"""
        wanted = WeightBlock(rows, cols)
        out: Tensor | None = None
        for region, block in zip(self._regions, self._blocks, strict=True):
            common = region.intersect(wanted)
            if common is None:
                continue
            values = cast(LowWeight, block).dense(*common.within(region))
            if common == wanted:
                return values
            if out is None:
                out = values.new_empty(rows.stop - rows.start, cols.stop - cols.start)
            out[common.within(wanted)] = values
        assert out is not None, "blocks make up the whole matrix"
        return out


def lowered(weight: Tensor, layout: Layout) -> LowWeight:
    """A weight in the formats of its blocks.

    Args:
        weight: Full-precision weight. [out, in]
        layout: Its blocks and their formats.

    Returns:
        The low-precision weight.

    Raises:
        ModelLoadError: If the weight holds NaN or infinity.
    """
    return quantize(weight, layout[0][1]) if len(layout) == 1 else MixedWeight(weight, layout)
