"""FP8 E5M2 with one scale per output row: more range and less precision than E4M3."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization import Float8Tensor, PerRow

from pahq_hf.precision.formats.by_rows import by_rows
from pahq_hf.precision.formats.per_row import SMALLEST, PerRowWeight


class Float8E5M2Weight(PerRowWeight):
    """A weight matrix as torchao FP8 E5M2, scaled per row.

    Args:
        weight: Full-precision weight. [out, in]
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(by_rows(_quantize, weight))

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The stored values of a block, in FP32. [rows, cols]"""
        return decode_e5m2(self.codes[rows, cols], self.scale[rows])


def _quantize(rows: Tensor) -> Float8Tensor:
    return Float8Tensor.from_hp(
        rows, float8_dtype=torch.float8_e5m2, granularity=PerRow(), hp_value_lb=SMALLEST
    )


def decode_e5m2(codes: Tensor, scale: Tensor) -> Tensor:
    """Decode E5M2 codes exactly: they are the upper halves of float16 numbers.

    Args:
        codes: float8_e5m2 values. [rows, cols]
        scale: FP32 scale per row. [rows, 1]

    Returns:
        `codes * scale` in FP32. [rows, cols]
    """
    bits = codes.view(torch.uint8).to(torch.int16).bitwise_left_shift_(8)
    return bits.view(torch.float16).to(torch.float32).mul_(scale)
