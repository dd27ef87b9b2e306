"""FP8 E4M3 with one scale per output row: a torchao `Float8Tensor` and an exact, fast decode."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization import Float8Tensor, PerRow

from pahq_hf.precision.scaled import ScaledWeight

# E4M3's exponent bias is 7, float16's is 15: the same bits mean 2**-8 of the value.
_BIAS_SHIFT = 256.0


def decode_e4m3(codes: Tensor, scale: Tensor) -> Tensor:
    """Decode E4M3 codes exactly, several times faster than the scalar cast PyTorch has on CPU.

    An E4M3 byte `s eeee mmm` moved into the top of a float16 `s 0eeee mmm0000000` denotes the same
    number times 2**-8, subnormals included. The two NaN codes are not treated: weights are finite.

    Args:
        codes: float8_e4m3fn values. [rows, cols]
        scale: FP32 scale per row. [rows, 1]

    Returns:
        `codes * scale` in FP32, bit-equal to torchao's `dequantize`. [rows, cols]
    """
    if codes.device.type != "cpu":
        return codes.to(torch.float32) * scale
    bits = codes.view(torch.int8).to(torch.int16)  # sign-extended: bit 15 is the sign
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4001)  # bit 14 held the byte's sign, clear it
    return bits.view(torch.float16).to(torch.float32).mul_(scale * _BIAS_SHIFT)


class Float8Weight(ScaledWeight):
    """A weight matrix as torchao FP8 E4M3, scaled per row.

    Args:
        weight: Full-precision weight. [out, in]
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(Float8Tensor.from_hp(weight.to(torch.float32), granularity=PerRow()))

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The stored values of a block, in FP32. [rows, cols]"""
        return decode_e4m3(self.codes[rows, cols], self.scale[rows])
