"""`PAHQLinear`: one projection that can be full precision, low precision, or low with FP32 parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pahq_hf.config import Format
from pahq_hf.errors import ConfigError
from pahq_hf.precision.low import LowWeight, quantize
from pahq_hf.precision.product import Product
from pahq_hf.precision.source import SourceBlock


@dataclass(frozen=True)
class Region:
    """A block of a weight matrix: half-open row (output) and column (input) ranges."""

    rows: slice
    cols: slice

    def intersect(self, other: Region) -> Region | None:
        """The common block, or None."""
        rows = slice(max(self.rows.start, other.rows.start), min(self.rows.stop, other.rows.stop))
        cols = slice(max(self.cols.start, other.cols.start), min(self.cols.stop, other.cols.stop))
        return Region(rows, cols) if rows.start < rows.stop and cols.start < cols.stop else None

    def within(self, outer: Region) -> tuple[slice, slice]:
        """This block's index relative to a block that contains it."""
        r, c = outer.rows.start, outer.cols.start
        return (
            slice(self.rows.start - r, self.rows.stop - r),
            slice(self.cols.start - c, self.cols.stop - c),
        )


class PAHQLinear(nn.Module):
    """`y = x W^T + b` whose W is [out, in] whatever the checkpoint's layout.

    While `weight` is a parameter the module is an ordinary linear layer. `lower` replaces it by a
    low-precision tensor plus the place in the checkpoint where FP32 blocks can be read on demand.

    Args:
        weight: Full-precision weight. [out, in]
        bias: Bias. [out]
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.low: nn.Module | None = None
        self._block: SourceBlock | None = None
        self._raised: list[tuple[Region, Tensor]] = []
        self._held: Tensor | None = None
        self._product: Product | None = None
        self._pieces: dict[tuple[int, int, int, int], Product] = {}
        self._full = False

    # -- precision ------------------------------------------------------------------------------

    def lower(self, fmt: Format, block: SourceBlock) -> None:
        """Keep the weight in a low-precision format from now on.

        Args:
            fmt: The format.
            block: Where to read FP32 values.
        """
        if self.weight is None:
            raise ConfigError("this projection is kept in low precision already")
        self.release()
        self.low = cast(nn.Module, quantize(self.weight, fmt))
        self._block = block
        self.weight = None

    def raise_region(self, region: Region) -> None:
        """Materialise the FP32 values of a block; the product uses them until `drop_raised`."""
        if self.low is not None:
            self._drop_products()
            self._raised.append((region, self._read_full(region)))

    def drop_raised(self) -> None:
        """Free every FP32 block."""
        if self._raised:
            self._drop_products()
            self._raised.clear()

    def hold(self, *, packed: bool) -> int:
        """Keep the low-precision weight decoded, and the effective one packed if asked, until `release`.

        Args:
            packed: Also keep the weight packed for the processor, for `forward`.

        Returns:
            Bytes this takes beside the stored weight.
        """
        if self.low is not None and self._held is None:
            self._held = self.base()
        if packed and self._product is None and not self._full:  # in full precision it would go unused
            self._product = Product(self.dense(), self.bias)
        return self.held_bytes

    def release(self) -> None:
        """Free what `hold` keeps."""
        self._held = None
        self._drop_products()

    def _drop_products(self) -> None:
        self._product = None
        self._pieces.clear()

    @property
    def held_bytes(self) -> int:
        """Bytes that `hold` keeps."""
        decoded = 0 if self._held is None else self._held.nbytes
        products = [*self._pieces.values(), *([] if self._product is None else [self._product])]
        return decoded + sum(product.nbytes for product in products)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, every product reads the FP32 weight from the checkpoint and drops it again."""
        before, self._full = self._full, True
        try:
            yield
        finally:
            self._full = before

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as resident now, FP32 blocks in use included."""
        base = self.weight.nbytes if self.weight is not None else cast(LowWeight, self.low).nbytes
        return base + sum(values.nbytes for _, values in self._raised)

    # -- values ---------------------------------------------------------------------------------

    @property
    def region(self) -> Region:
        """The whole matrix."""
        return Region(slice(0, self.out_features), slice(0, self.in_features))

    def dense(self, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """The effective weight of a block at the current precision. [rows, cols]"""
        rows = rows or slice(0, self.out_features)
        cols = cols or slice(0, self.in_features)
        if self.weight is not None:
            return self.weight[rows, cols]
        wanted = Region(rows, cols)
        if self._full:
            return self._read_full(wanted)
        weight = self._stored(wanted)
        if self._raised and self._held is not None:
            weight = weight.clone()  # what is held stays as it is stored
        for region, values in self._raised:
            common = region.intersect(wanted)
            if common is not None:
                weight[common.within(wanted)] = values[common.within(region)]
        return weight

    def base(self) -> Tensor:
        """The weight as it is stored, without FP32 blocks in use. [out, in]"""
        return self.weight if self.weight is not None else self._stored(self.region)

    @property
    def is_raised(self) -> bool:
        """Whether FP32 blocks are in use."""
        return bool(self._raised)

    def _stored(self, wanted: Region) -> Tensor:
        if self._held is not None:
            return self._held[wanted.rows, wanted.cols]
        return cast(LowWeight, self.low).dense(wanted.rows, wanted.cols)

    def _read_full(self, region: Region) -> Tensor:
        if self._block is None or self.low is None:
            raise ConfigError("this projection is resident in full precision; there is nothing to read")
        values = self._block.read(region.rows, region.cols)
        device = next(self.low.parameters()).device
        return values.to(device=device, dtype=torch.float32)

    # -- products -------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`. [..., in] -> [..., out]"""
        if self._product is not None and not self._full:
            return self._product(x)
        return F.linear(x, self.dense(), self.bias)

    def block(self, x: Tensor, rows: slice) -> Tensor:
        """The same for some outputs only. [..., in] -> [..., rows]"""
        return F.linear(x, self.dense(rows), None if self.bias is None else self.bias[rows])

    def piece(self, rows: slice, cols: slice) -> Product:
        """A block of the effective weight packed for many products; kept until `release`.

        Includes the bias of its rows when the block spans all columns.
        """
        key = (rows.start, rows.stop, cols.start, cols.stop)
        if key not in self._pieces:
            whole = cols.start == 0 and cols.stop == self.in_features
            bias = self.bias[rows] if whole and self.bias is not None else None
            self._pieces[key] = Product(self.dense(rows, cols), bias)
        return self._pieces[key]

    def extra_repr(self) -> str:
        """Sizes and precision, for `print(model)`."""
        kind = type(self.low).__name__ if self.low is not None else "full"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"
