"""The low-precision formats: their names, what makes their weights, what those take, how fine they are."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pahq_hf.errors import ConfigError, ModelLoadError, check_registered, code_of, describe, first_line

if TYPE_CHECKING:  # torch takes seconds to import, and names are checked without it
    from torch import Tensor


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


@dataclass(frozen=True)
class LowFormat:
    """A low-precision format.

    Attributes:
        name: What it is called, in lower case.
        make: Rounds a weight, [out, in], row by row; imports what that takes, which naming a format does not.
        stored_bytes: Bytes that a matrix of so many rows and columns takes, scales included.
        error: Of a score, relative: below it are 99 % of them, in BF16 or FP32 products.
        fineness: Larger for finer formats: weights that components share are kept in the finest of theirs.
    """

    name: str
    make: Callable[[Tensor], LowWeight]
    stored_bytes: Callable[[int, int], int]
    error: float
    fineness: int


def _float8(weight: Tensor) -> LowWeight:
    from pahq_hf.precision.formats.float8 import Float8Weight

    return Float8Weight(weight)


def _float8_e5m2(weight: Tensor) -> LowWeight:
    from pahq_hf.precision.formats.float8_e5m2 import Float8E5M2Weight

    return Float8E5M2Weight(weight)


def _int8(weight: Tensor) -> LowWeight:
    from pahq_hf.precision.formats.int8 import Int8Weight

    return Int8Weight(weight)


def _bfloat16(weight: Tensor) -> LowWeight:
    from pahq_hf.precision.formats.bfloat16 import BFloat16Weight

    return BFloat16Weight(weight)


def _mx(weight: Tensor) -> LowWeight:
    from pahq_hf.precision.formats.mx import MXWeight

    return MXWeight(weight)


def _bytes_per_row(rows: int, cols: int) -> int:
    return rows * cols + 4 * rows  # one byte each, and an FP32 scale for every row


def _bytes_of_bfloat16(rows: int, cols: int) -> int:
    return 2 * rows * cols


def _bytes_of_mx(rows: int, cols: int) -> int:
    return rows * -(-cols // 32) * 33  # whole groups of 32, each with a scale of one byte


# Errors and their order as measured: docs/precision.md. Of fp8 and int8 on SmolLM2; of the others on the demo
# checkpoint, where fp8 has .022 and int8 .005.
_FORMATS = {
    row.name: row
    for row in (
        LowFormat("fp8", _float8, _bytes_per_row, error=0.10, fineness=3),
        LowFormat("fp8-e5m2", _float8_e5m2, _bytes_per_row, error=0.064, fineness=1),
        LowFormat("int8", _int8, _bytes_per_row, error=0.05, fineness=4),
        LowFormat("bf16", _bfloat16, _bytes_of_bfloat16, error=0.003, fineness=5),
        LowFormat("mx", _mx, _bytes_of_mx, error=0.035, fineness=2),
    )
}


_BUILT_IN = frozenset({*_FORMATS, "fp32"})


def register_format(fmt: LowFormat) -> None:
    """Add a format of one's own, or replace one: `format=`, `policy=` and `--format` know its name then.

    Args:
        fmt: The format.

    Raises:
        ConfigError: If the name is no name, or that of a built-in format.

    Example:
        ```python
        register_format(LowFormat("int4", Int4Weight, lambda rows, cols: rows * (cols // 2 + 4), 0.2, 0))
        model = PAHQModel.from_pretrained("gpt2", format="int4")
        ```
    """
    check_registered(fmt, LowFormat, "format", _BUILT_IN)
    for name in ("make", "stored_bytes"):
        if not callable(getattr(fmt, name)):
            raise ConfigError(f"format {fmt.name!r} needs a function as {name}")
    if not (_is_number(fmt.error) and 0 < fmt.error < math.inf):
        raise ConfigError(f"format {fmt.name!r} needs its scores' error, above 0; got {fmt.error!r}")
    if not _is_number(fmt.fineness):
        raise ConfigError(f"format {fmt.name!r} needs a number as its fineness; got {fmt.fineness!r}")
    try:
        size = fmt.stored_bytes(64, 96)
    except Exception as error:  # whatever a function of somebody's own raises
        raise ConfigError(
            f"format {fmt.name!r}: stored_bytes(64, 96) fails ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not (_is_number(size) and size > 0):
        raise ConfigError(f"format {fmt.name!r}: stored_bytes(64, 96) must be above 0; got {size!r}")
    _FORMATS[fmt.name] = fmt


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def known_formats() -> list[str]:
    """Names of formats, the built-in ones first."""
    return list(_FORMATS)


def find_format(name: str) -> LowFormat:
    """The format of a name.

    Args:
        name: Such as `fp8`.

    Raises:
        ConfigError: If there is none.
    """
    found = next((fmt for fmt in _FORMATS.values() if fmt.name == name), None)
    if found is None:
        raise ConfigError(f"format must be one of {', '.join(_FORMATS)}; got {name!r}")
    return found


def stored_bytes(rows: int, cols: int, fmt: str) -> int:
    """Bytes a matrix takes in a format, scales included.

    Args:
        rows: Outputs.
        cols: Inputs.
        fmt: Name of a format, or `fp32`.
    """
    return 4 * rows * cols if fmt == "fp32" else find_format(fmt).stored_bytes(rows, cols)


def quantize(weight: Tensor, fmt: str) -> LowWeight:
    """Round a weight matrix to a low-precision format, row by row.

    Args:
        weight: Full-precision weight. [out, in]
        fmt: Name of the format.

    Returns:
        The low-precision weight.

    Raises:
        ConfigError: If there is no such format, or what it makes is no weight of this shape.
        ModelLoadError: If the weight holds NaN or infinity, which no scale can represent.
    """
    from pahq_hf.precision.formats.by_rows import all_finite

    make = find_format(fmt).make
    if not all_finite(weight):
        raise ModelLoadError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity")
    with nullcontext() if fmt in _BUILT_IN else code_of(f"format {fmt!r}"):
        made = make(weight.detach())
        _check_made(made, weight, fmt)
    return made


def _check_made(made: LowWeight, weight: Tensor, fmt: str) -> None:
    """Check what a format made of a weight, by its last row: one of a user's own may be wrong."""
    import torch

    if not isinstance(made, torch.nn.Module):
        raise ConfigError(f"format {fmt!r} makes no torch.nn.Module, but {describe(made)}")
    rows, cols = weight.shape
    shape = tuple(getattr(made, "shape", ()))
    if shape != (rows, cols):
        raise ConfigError(f"format {fmt!r} makes a weight of shape {shape} of one of {(rows, cols)}")
    row = made.dense(slice(rows - 1, rows), slice(0, cols))
    if not isinstance(row, torch.Tensor):
        raise ConfigError(f"format {fmt!r}: dense must give a tensor; got {describe(row)}")
    if tuple(row.shape) != (1, cols) or row.dtype != torch.float32:
        raise ConfigError(
            f"format {fmt!r} gives {row.dtype} of shape {tuple(row.shape)} as a row of {cols} values in FP32"
        )
    if fmt in _BUILT_IN:
        return
    if not row.isfinite().all():
        raise ConfigError(f"format {fmt!r}: dense gives NaN or infinity")
    if not _is_number(made.nbytes):
        raise ConfigError(f"format {fmt!r}: nbytes must be a number; got {describe(made.nbytes)}")
    # A block that is not the one asked for has the right shape.
    first, half = max(0, rows - 2), cols // 2
    block = made.dense(slice(first, rows), slice(half, cols))
    if tuple(block.shape) != (rows - first, cols - half) or not torch.equal(block[-1], row[0, half:]):
        raise ConfigError(
            f"format {fmt!r}: dense must give the rows and columns it is asked for; the last row in "
            f"dense({first}:{rows}, {half}:{cols}) is not that in dense({rows - 1}:{rows}, 0:{cols})"
        )
