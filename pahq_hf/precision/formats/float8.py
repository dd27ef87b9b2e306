"""FP8 E4M3 with one scale per output row: a torchao `Float8Tensor` and an exact, fast decode."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization import Float8Tensor, PerRow

from pahq_hf.precision.backward import differentiable, is_differentiated
from pahq_hf.precision.formats.by_rows import by_rows
from pahq_hf.precision.formats.per_row import SMALLEST, PerRowWeight

# E4M3's exponent bias is 7, float16's is 15: the same bits mean 2**-8 of the value.
_BIAS_SHIFT = 256.0
_LARGEST = 448.0  # of E4M3
_TILE = 16  # of both sizes of a matrix that FP8 kernels multiply


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


class Float8Weight(PerRowWeight):
    """A weight matrix as torchao FP8 E4M3, scaled per row.

    Args:
        weight: Full-precision weight. [out, in]
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(by_rows(_quantize, weight))

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The stored values of a block, in FP32. [rows, cols]"""
        return decode_e4m3(self.codes[rows, cols], self.scale[rows])

    def dynamic(self, rows: slice, cols: slice) -> DynamicFloat8Product | None:
        """A block's product with inputs that are rounded to FP8 too; None for sizes no kernel takes."""
        if not DynamicFloat8Product.takes(rows.stop - rows.start, cols.stop - cols.start):
            return None
        return DynamicFloat8Product(self.codes[rows, cols].contiguous(), self.scale[rows].contiguous())


def _quantize(rows: Tensor) -> Float8Tensor:
    return Float8Tensor.from_hp(rows, granularity=PerRow(), hp_value_lb=SMALLEST)


class DynamicFloat8Product:
    """`y = x W^T` in FP8: rows of x are scaled on the fly, sums are FP32, y is BF16.

    `torch._scaled_mm` with a scale for each row on either side: CUDA with compute capability 8.9 or newer.
    torchao's product of a `Float8Tensor` is the same kernel, but takes no floor for the scales of x where
    another library offers the kernel, so that rows without a change, all zeros, would become NaN.

    Args:
        codes: E4M3 codes of W; both sizes multiples of 16. [out, in]
        scale: One for each row. [out, 1]
    """

    dtype = torch.bfloat16  # of what it takes and gives

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self._codes = codes
        self._scale = scale
        self.nbytes = codes.nbytes + scale.nbytes

    @staticmethod
    def takes(rows: int, cols: int) -> bool:
        """Whether the kernel takes a weight of this shape."""
        return rows % _TILE == 0 and cols % _TILE == 0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return self.raw(x).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The same, as its own backward pass calls it. [..., in] -> [..., out]"""
        return self(x)

    def transposed(self, y: Tensor) -> Tensor:
        """`y W`, of a backward pass. [..., out] -> [..., in]"""
        return y @ decode_e4m3(self._codes, self._scale).to(y.dtype)

    def raw(self, x: Tensor) -> Tensor:
        """The same in BF16. [..., in] -> [..., out]"""
        if is_differentiated(x):
            return differentiable(self, x)
        rows = x.flatten(0, -2)
        largest = rows.abs().amax(-1, keepdim=True).to(torch.float32)
        scale = largest.clamp_min(SMALLEST) / _LARGEST
        codes = (rows / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(
            codes,
            self._codes.t(),
            scale_a=scale,
            scale_b=self._scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=False,  # sums of all products in FP32, not in the tensor cores' 14 bits
        )
        return y.unflatten(0, x.shape[:-1])
