"""MXFP8: FP8 E4M3 with one power-of-two scale for every 32 inputs (OCP Microscaling 1.0)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor

from pahq_hf.precision.formats.by_rows import by_rows
from pahq_hf.precision.formats.float8 import decode_e4m3

GROUP = 32


class MXWeight(nn.Module):
    """A weight matrix as a torchao `MXTensor`; rows are padded with zeros to whole groups.

    Args:
        weight: Full-precision weight. [out, in]
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._cols = weight.shape[1]
        self.tensor: Any = nn.Parameter(by_rows(_quantize, weight), requires_grad=False)

    @property
    def _codes(self) -> Tensor:
        codes: Tensor = self.tensor.qdata  # [out, padded in]
        return codes

    @property
    def _scale(self) -> Tensor:
        scale: Tensor = self.tensor.scale  # float8_e8m0fnu [out, groups]
        return scale

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (out) and columns (in)."""
        return self._codes.shape[0], self._cols

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, padding included."""
        return self._codes.nbytes + self._scale.nbytes

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The stored values of a block, in FP32. [rows, cols]"""
        first, last = cols.start // GROUP, -(-cols.stop // GROUP)
        codes = self._codes[rows, first * GROUP : last * GROUP]
        scale = _exponents(self._scale[rows, first:last]).repeat_interleave(GROUP, dim=1)
        start = cols.start - first * GROUP
        return decode_e4m3(codes, scale)[:, start : start + cols.stop - cols.start]


def _quantize(rows: Tensor) -> Any:
    padded = F.pad(rows, (0, -rows.shape[1] % GROUP)).contiguous()
    return MXTensor.to_mx(padded, torch.float8_e4m3fn, GROUP)


def _exponents(scale: Tensor) -> Tensor:
    """Powers of two from their E8M0 bytes, which are the exponents of FP32 numbers."""
    bits = scale.view(torch.uint8).to(torch.int32)
    # A zero byte means 2**-127, which FP32 holds as a subnormal: half of its smallest normal number.
    return torch.where(bits == 0, torch.full_like(bits, 1 << 22), bits << 23).view(torch.float32)
