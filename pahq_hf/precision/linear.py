"""`PAHQLinear`: one projection that can be full precision, low precision, or low with FP32 parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pahq_hf.config import Format
from pahq_hf.errors import ConfigError
from pahq_hf.precision.anchor import Anchor, Origin
from pahq_hf.precision.float8 import Float8Weight
from pahq_hf.precision.gradient import differentiable, is_differentiated
from pahq_hf.precision.low import LowWeight
from pahq_hf.precision.pieces import lowered
from pahq_hf.precision.product import DifferenceProduct, Product, can_pack
from pahq_hf.precision.region import Layout, Region
from pahq_hf.precision.source import SourceBlock, Staging
from pahq_hf.precision.stored import StoredWeight


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
        self._raised: list[tuple[Region, Tensor | None]] = []  # None: read when wanted
        self._held: Tensor | None = None
        self._product: Product | None = None
        self._pieces: dict[tuple[int, int, int, int], Product] = {}
        self._differences: dict[tuple[int, int, int, int], DifferenceProduct] = {}
        self._compute = torch.float32
        self._full = False
        self.staging = Staging()  # PrecisionControl gives all projections the same
        self._streamed: Product | None = None
        self._anchor: Anchor | None = None
        self._recorded: list[Anchor] | None = None

    # -- precision ------------------------------------------------------------------------------

    def lower(
        self,
        fmt: Format | Layout,
        block: SourceBlock,
        compute: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Keep the weight in a low-precision format from now on.

        Args:
            fmt: The format, or those of blocks that make up the matrix.
            block: Where to read FP32 values; also this one, where the weight has no memory yet.
            compute: Dtype in which products of differences run.
            device: Where the weight is rounded and kept, if it has no memory yet; the CPU by default.

        Raises:
            ConfigError: If the weight is low already.
            ModelLoadError: If it holds NaN or infinity.
        """
        if self.weight is None:
            raise ConfigError("this projection is kept in low precision already")
        self.release()
        layout: Layout = [(self.region, fmt)] if isinstance(fmt, str) else fmt
        weight: Tensor = self.weight
        if weight.is_meta:
            weight = block.view(*self._everything)
            weight = weight if device is None else weight.to(device)
        self.low = cast(nn.Module, lowered(weight, layout))
        self._block = block
        self.staging.expect(block)
        self._compute = compute
        self.weight = None

    def compute_in(self, compute: torch.dtype) -> None:
        """Let products of differences run in another dtype from now on."""
        self.release()
        self._compute = compute

    def raise_region(self, region: Region) -> None:
        """Materialise the FP32 values of a block; the product uses them until `drop_raised`."""
        if self.low is not None:
            self._drop_products()
            transfer = self.staging.transfer(self._device)
            values = None if transfer is None else transfer.take(self._key(region))
            if values is None:
                values = self._source.view(region.rows, region.cols)  # fails if the checkpoint changed
                # On the CPU no copy is kept: products are packed from the mapped file.
                values = None if self._device.type == "cpu" else values.to(self._device)
            self._raised.append((region, values))

    def leave(self, block: SourceBlock, device: torch.device) -> None:
        """Leave the weight where it is, in the checkpoint, and read what is wanted of it.

        Args:
            block: Where it is.
            device: Where values go.
        """
        self.low = StoredWeight(block, (self.out_features, self.in_features), device)
        self._block = block
        self.weight = None

    def prefetch(self, region: Region) -> None:
        """Let the FP32 values of a block come in the background: into memory, or to the GPU."""
        if self._block is None:
            return
        transfer = self.staging.transfer(self._device)
        if transfer is None:
            self._block.prefetch()
        else:
            transfer.start(self._key(region), lambda: self._source.view(region.rows, region.cols))

    def drop_raised(self) -> None:
        """Free every FP32 block."""
        if self._raised:
            self._drop_products()
            self._raised.clear()

    def hold_decoded(self) -> int:
        """Keep the low-precision weight decoded until `release`. Returns bytes held beside the weight."""
        if self.low is not None and self._held is None:
            with self._not_full():
                self._held = self.base()
        return self.held_bytes

    def hold_packed(self) -> int:
        """Keep the effective weight decoded, and packed for `forward`. Returns bytes held."""
        with self._not_full():  # what full precision reads is not kept
            self.hold_decoded()
            if self._product is None:
                self._product = Product(self.dense(), self.bias)
        return self.held_bytes

    def hold_difference(self) -> int:
        """Keep the product of differences packed. Returns bytes held."""
        with self._not_full():
            self.difference(*self._everything)
        return self.held_bytes

    def release(self) -> None:
        """Free what `hold` keeps."""
        self._held = None
        self._drop_products()

    def _drop_products(self) -> None:
        self._product = None
        self._pieces.clear()
        self._differences.clear()

    @property
    def held_bytes(self) -> int:
        """Bytes held beside the stored weight until `release`."""
        decoded = 0 if self._held is None else self._held.nbytes
        products: list[DifferenceProduct] = [*self._pieces.values(), *self._differences.values()]
        if self._product is not None:
            products.append(self._product)
        return decoded + sum(product.nbytes for product in products)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, every product reads the FP32 weight from the checkpoint and drops it again."""
        before, self._full = self._full, True
        try:
            yield
        finally:
            self._full = before

    @contextmanager
    def _not_full(self) -> Iterator[None]:
        before, self._full = self._full, False
        try:
            yield
        finally:
            self._full = before

    @contextmanager
    def streamed(self) -> Iterator[None]:
        """Inside full precision: read the FP32 weight once for all products until the end."""
        if not self._full or self.low is None:
            yield
            return
        self._streamed = self._full_product(*self._everything, self.bias)
        try:
            yield
        finally:
            self._streamed = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as resident now, FP32 blocks in use included."""
        base = self.weight.nbytes if self.weight is not None else cast(LowWeight, self.low).nbytes
        return base + sum(4 * region.size for region, _ in self._raised)

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
        for region, values in self._raised:
            if region.intersect(wanted) == wanted:
                return self._raised_values(region, values, wanted)
        weight = self._stored(wanted)
        if self._raised and self._held is not None:
            weight = weight.clone()  # what is held stays as it is stored
        for region, values in self._raised:
            common = region.intersect(wanted)
            if common is not None:
                weight[common.within(wanted)] = self._raised_values(region, values, common)
        return weight

    def _raised_values(self, region: Region, values: Tensor | None, wanted: Region) -> Tensor:
        if values is None:
            return self._read_full(wanted)
        return values[wanted.within(region)].to(torch.float32)

    @property
    def _everything(self) -> tuple[slice, slice]:
        return self.region.rows, self.region.cols

    def base(self) -> Tensor:
        """The weight as it is stored, without FP32 blocks in use; FP32 in full precision. [out, in]"""
        if self.weight is not None:
            return self.weight
        return self._read_full(self.region) if self._full else self._stored(self.region)

    def is_raised_in(self, region: Region) -> bool:
        """Whether FP32 blocks in use touch a block."""
        return any(raised.intersect(region) is not None for raised, _ in self._raised)

    @property
    def is_raised(self) -> bool:
        """Whether FP32 blocks are in use."""
        return bool(self._raised)

    def _stored(self, wanted: Region) -> Tensor:
        if self._held is not None:
            return self._held[wanted.rows, wanted.cols]
        return cast(LowWeight, self.low).dense(wanted.rows, wanted.cols)

    def _read_full(self, region: Region) -> Tensor:
        values = self._source.read(region.rows, region.cols)
        return values.to(device=self._device, dtype=torch.float32)

    def _stage_full(self, rows: slice, cols: slice) -> Tensor:
        """FP32 values for use at once: the next call may overwrite them. [rows, cols]"""
        return self._source.stage(rows, cols, self.staging).to(self._device)

    def _full_product(self, rows: slice, cols: slice, bias: Tensor | None) -> Product:
        def make() -> Product:
            weight = self._stage_full(rows, cols)
            return Product(weight if can_pack(weight) else weight.clone(), bias)

        return self.staging.kept.get(self._key(Region(rows, cols)), make)

    def _key(self, region: Region) -> tuple[int, int, int, int, int]:
        rows, cols = region.rows, region.cols
        return id(self), rows.start, rows.stop, cols.start, cols.stop

    @property
    def source_block(self) -> SourceBlock | None:
        """Where FP32 values are read; None where they are resident."""
        return self._block

    @property
    def _source(self) -> SourceBlock:
        if self._block is None:
            raise ConfigError("this projection is resident in full precision; there is nothing to read")
        return self._block

    @property
    def _device(self) -> torch.device:
        low = cast(nn.Module, self.low)
        return next(chain(low.parameters(), low.buffers())).device

    # -- products -------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`. [..., in] -> [..., out]"""
        if is_differentiated(x) and not self._is_plain:
            return differentiable(self, x)
        if self._anchor is not None:
            product = self.difference(*self._everything)
            moved = product.raw(self._anchor.origin.difference(x, product.dtype)).to(x.dtype)
            return moved if self._anchor.y is None else moved.add_(self._anchor.y)
        y = self._absolute(x)
        if self._recorded is not None:
            self._recorded.append(Anchor(Origin(x), y))
        return y

    @property
    def _is_plain(self) -> bool:
        """Whether `forward` is PyTorch's own product, which knows its backward pass."""
        return self.low is None and self._product is None and self._anchor is None

    def transposed(self, y: Tensor) -> Tensor:
        """`y W`, of a backward pass. [..., out] -> [..., in]"""
        if self._full and self.low is not None:
            return y @ self._stage_full(*self._everything)
        return y @ self.dense()

    def _absolute(self, x: Tensor) -> Tensor:
        if self._full and self._streamed is not None:
            return self._streamed(x)
        if self._product is not None and not self._full:
            return self._product(x)
        if self._full and self.low is not None:
            return F.linear(x, self._stage_full(*self._everything), self.bias)
        return F.linear(x, self.dense(), self.bias)

    def block(self, x: Tensor, rows: slice) -> Tensor:
        """The same for some outputs only. [..., in] -> [..., rows]"""
        return F.linear(x, self.dense(rows), None if self.bias is None else self.bias[rows])

    def blocks(self, x: Tensor, size: int) -> Tensor:
        """Equal runs of outputs, each from an input of its own.

        Args:
            x: One input for each run, or an equal number of consecutive ones. [n, ..., in]
            size: Outputs in a run.

        Returns:
            [n, ..., size]
        """
        if self._anchor is not None:
            moved = self._each(x - self._anchor.x, size)
            return moved if self._anchor.y is None else moved.add_(self._anchor.y)
        y = self._each(x, size)
        if self.bias is not None:
            bias = self.bias.unflatten(0, (-1, size))
            bias = bias.repeat_interleave(x.shape[0] // bias.shape[0], dim=0)
            y = y + bias.view(x.shape[0], *([1] * (x.ndim - 2)), size)
        if self._recorded is not None:
            self._recorded.append(Anchor(Origin(x), y))
        return y

    def _each(self, x: Tensor, size: int) -> Tensor:
        weight = self.dense().unflatten(0, (-1, size))  # [run, size, in]
        weight = weight.repeat_interleave(x.shape[0] // weight.shape[0], dim=0)
        return torch.einsum("n...d,ned->n...e", x, weight)

    def piece(self, rows: slice, cols: slice) -> Product:
        """A block of the effective weight packed for many products; kept until `release`.

        Includes the bias of its rows when the block spans all columns. In full precision it is read from
        the checkpoint and not kept.
        """
        key = (rows.start, rows.stop, cols.start, cols.stop)
        if not self._full and key in self._pieces:
            return self._pieces[key]
        whole = cols.start == 0 and cols.stop == self.in_features
        bias = self.bias[rows] if whole and self.bias is not None else None
        if self._full and self.low is not None:
            return self._full_product(rows, cols, bias)
        product = Product(self.dense(rows, cols), bias)
        if not self._full:
            self._pieces[key] = product
        return product

    # -- anchors --------------------------------------------------------------------------------

    def difference(self, rows: slice, cols: slice) -> DifferenceProduct:
        """A block of the effective weight for products with differences; kept until `release`.

        It has no bias, and computes in the dtype of `compute` unless FP32 blocks in use touch it.
        """
        key = (rows.start, rows.stop, cols.start, cols.stop)
        if self._full or self.low is None:
            return Product(self.dense(rows, cols))
        if key not in self._differences:
            self._differences[key] = self._make_difference(Region(rows, cols))
        return self._differences[key]

    def _make_difference(self, block: Region) -> DifferenceProduct:
        weight = self.dense(block.rows, block.cols)
        if self.is_raised_in(block):
            return Product(weight)
        if self._compute == torch.float8_e4m3fn and isinstance(self.low, Float8Weight):
            product = self.low.dynamic(block.rows, block.cols)
            if product is not None:
                return product
        # FP8 products want FP8 weights, in tiles; BF16 ones run wherever those do.
        wide = torch.bfloat16 if self._compute == torch.float8_e4m3fn else self._compute
        return Product(weight.to(wide))

    @contextmanager
    def recording(self) -> Iterator[list[Anchor]]:
        """Inside, every product is noted down with its input."""
        before, self._recorded = self._recorded, []
        try:
            yield self._recorded
        finally:
            self._recorded = before

    @contextmanager
    def anchored(self, anchor: Anchor) -> Iterator[None]:
        """Inside, `y = y0 + W_low (x - x0)`: the low-precision weight multiplies differences only."""
        before, self._anchor = self._anchor, anchor
        try:
            yield
        finally:
            self._anchor = before

    def extra_repr(self) -> str:
        """Sizes and precision, for `print(model)`."""
        kind = type(self.low).__name__ if self.low is not None else "full"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"
