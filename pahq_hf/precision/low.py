"""The protocol of a low-precision weight, and the table of formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from pahq_hf.config import Format
from pahq_hf.errors import ModelLoadError
from pahq_hf.precision.bfloat16 import BFloat16Weight
from pahq_hf.precision.float8 import Float8Weight
from pahq_hf.precision.float8_wide import WideFloat8Weight
from pahq_hf.precision.int8 import Int8Weight
from pahq_hf.precision.mx import GROUP, MXWeight
from pahq_hf.precision.rows import all_finite


class LowWeight(Protocol):
    """A weight matrix [out, in] stored in few bytes.

    Implementations are modules, so that they follow `model.to(device)`.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (out) and columns (in)."""

    @property
    def nbytes(self) -> int:
        """Bytes really held, scales included."""

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The stored values of a block, in FP32. [rows, cols]"""


_FORMATS: dict[str, Callable[[Tensor], nn.Module]] = {
    "fp8": Float8Weight,
    "fp8-e5m2": WideFloat8Weight,
    "int8": Int8Weight,
    "bf16": BFloat16Weight,
    "mx": MXWeight,
}


def stored_bytes(rows: int, cols: int, fmt: str) -> int:
    """Bytes a matrix takes in a format, scales included.

    Args:
        rows: Outputs.
        cols: Inputs.
        fmt: Name of a format, or `fp32`.
    """
    if fmt == "fp32":
        return 4 * rows * cols
    if fmt == "bf16":
        return 2 * rows * cols
    if fmt == "mx":
        groups = -(-cols // GROUP)
        return rows * groups * (GROUP + 1)
    return rows * cols + 4 * rows  # one byte each, and an FP32 scale for every row


def quantize(weight: Tensor, fmt: Format) -> LowWeight:
    """Round a weight matrix to a low-precision format, row by row.

    Args:
        weight: Full-precision weight. [out, in]
        fmt: Name of the format.

    Returns:
        The low-precision weight.

    Raises:
        ModelLoadError: If the weight holds NaN or infinity, which no scale can represent.
    """
    if not all_finite(weight):
        raise ModelLoadError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity")
    return _FORMATS[fmt](weight.detach())  # type: ignore[return-value]
