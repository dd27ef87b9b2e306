"""Symmetric INT8 with one scale per output row, as a torchao `Int8Tensor`."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization import Int8Tensor, PerRow

from pahq_hf.precision.formats.by_rows import by_rows
from pahq_hf.precision.formats.per_row import PerRowWeight


class Int8Weight(PerRowWeight):
    """A weight matrix as torchao INT8, scaled per row.

    Args:
        weight: Full-precision weight. [out, in]
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(by_rows(lambda rows: Int8Tensor.from_hp(rows, granularity=PerRow()), weight))

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The stored values of a block, in FP32. [rows, cols]"""
        return self.codes[rows, cols].to(torch.float32).mul_(self.scale[rows])
