"""What torchao weights with one scale per row have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pahq_hf.precision.formats.one_tensor import OneTensor

# Least magnitude that a row is scaled for: without it torchao gives a row of zeros the scale 0, and NaN.
# Its scale is still a normal FP32 number.
SMALLEST = 1e-30


class PerRowWeight(OneTensor):
    """A torchao tensor subclass with codes `qdata` [out, in] and FP32 `scale` [out, 1].

    Args:
        tensor: A `Float8Tensor` or `Int8Tensor`, quantised per row.
    """

    def __init__(self, tensor: Any) -> None:
        super().__init__()
        self.tensor: Any = nn.Parameter(tensor, requires_grad=False)

    @property
    def codes(self) -> Tensor:
        """The low-precision codes. [out, in]"""
        codes: Tensor = self.tensor.qdata
        return codes

    @property
    def scale(self) -> Tensor:
        """FP32 scale of each row. [out, 1]"""
        scale: Tensor = self.tensor.scale
        return scale

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales (torchao's own `nbytes` reports the FP32 size)."""
        return self.codes.nbytes + self.scale.nbytes
