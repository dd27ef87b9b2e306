"""`PAHQLinear`: one projection that can be full precision, low precision, or low with FP32 parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pahq_hf.precision.anchors import Anchor, Origin
from pahq_hf.precision.backward import differentiable, is_differentiated
from pahq_hf.precision.formats.float8 import Float8Weight
from pahq_hf.precision.products import DeltaProduct, Product, can_pack
from pahq_hf.precision.weight_block import WeightBlock
from pahq_hf.precision.weights import WeightMatrix


class PAHQLinear(WeightMatrix):
    """`y = x W^T + b`, in the mode that the model's projections share.

    Args:
        weight: Full-precision weight. [out, in]
        bias: Bias. [out]
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`. [..., in] -> [..., out]"""
        if is_differentiated(x) and not self._is_plain:
            return differentiable(self, x)
        anchor = self.shared.mode.anchors.get(self)
        if anchor is not None:
            product = self.difference(self.whole.rows, self.whole.cols)
            moved = product.raw(anchor.origin.difference(x, product.dtype)).to(x.dtype)
            return moved if anchor.y is None else moved.add_(anchor.y)
        return self._noted(x, self._absolute(x))

    @property
    def _is_plain(self) -> bool:
        """Whether `forward` is PyTorch's own product, which knows its backward pass."""
        return self.low is None and self._packed is None and self not in self.shared.mode.anchors

    @property
    def _packed(self) -> Any:
        """The effective weight packed for `forward`, if the cache keeps it."""
        return self.shared.cache.peek(self._key("product", "packed"))

    def transposed(self, y: Tensor) -> Tensor:
        """`y W`, of a backward pass. [..., out] -> [..., in]"""
        if self.is_full and self.low is not None:
            return y @ self._stage_full(self.whole)
        return y @ self.dense()

    def _absolute(self, x: Tensor) -> Tensor:
        if self.is_full and self.low is not None:
            streamed = self.shared.mode.streamed.get(self)
            return F.linear(x, self._stage_full(self.whole), self.bias) if streamed is None else streamed(x)
        packed = None if self.is_full else self._packed
        y: Tensor = F.linear(x, self.dense(), self.bias) if packed is None else packed(x)
        return y

    def _noted(self, x: Tensor, y: Tensor) -> Tensor:
        """`y`, noted down as the product of `x` if someone wants that."""
        record = self.shared.mode.records.get(self)
        if record is not None:
            record.append(Anchor(Origin(x), y))
        return y

    # -- blocks ---------------------------------------------------------------------------------

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
        anchor = self.shared.mode.anchors.get(self)
        if anchor is not None:
            moved = self._each(x - anchor.x, size)
            return moved if anchor.y is None else moved.add_(anchor.y)
        y = self._each(x, size)
        if self.bias is not None:
            bias = self.bias.unflatten(0, (-1, size))
            bias = bias.repeat_interleave(x.shape[0] // bias.shape[0], dim=0)
            y = y + bias.view(x.shape[0], *([1] * (x.ndim - 2)), size)
        return self._noted(x, y)

    def _each(self, x: Tensor, size: int) -> Tensor:
        weight = self.dense().unflatten(0, (-1, size))  # [run, size, in]
        weight = weight.repeat_interleave(x.shape[0] // weight.shape[0], dim=0)
        return torch.einsum("n...d,ned->n...e", x, weight)

    # -- packed products ------------------------------------------------------------------------

    def piece(self, rows: slice, cols: slice) -> Product:
        """A block of the effective weight packed for many products; the cache keeps it.

        Includes the bias of its rows when the block spans all columns. In full precision it is read from
        the checkpoint.
        """
        block = WeightBlock(rows, cols)
        whole = cols.start == 0 and cols.stop == self.in_features
        bias = self.bias[rows] if whole and self.bias is not None else None
        if self.is_full and self.low is not None:
            return self.full_product(block, bias)
        key = self._key("product", "piece", block=block)
        return self.shared.cache.get(key, lambda: Product(self.dense(rows, cols), bias))

    def full_product(self, block: WeightBlock, bias: Tensor | None) -> Product:
        """A block of the FP32 weight in the checkpoint, packed for products. [rows, cols]"""

        def make() -> Product:
            weight = self._stage_full(block)
            lent = weight.device.type == "cpu" and not can_pack(weight)  # others use that memory next
            return Product(weight.clone() if lent else weight, bias)

        self.shared.full.turn()  # which makes the least recently used go first
        return self.shared.full.get(self._key("full", block=block), make)

    def difference(self, rows: slice, cols: slice) -> DeltaProduct:
        """A block of the effective weight for products with differences; the cache keeps it.

        The product has no bias, and computes in the dtype of `compute` unless FP32 blocks in use touch it.
        """
        if self.is_full or self.low is None:
            return Product(self.dense(rows, cols))
        block = WeightBlock(rows, cols)
        key = self._key("product", "difference", block=block)
        return self.shared.cache.get(key, lambda: self._make_difference(block))

    def _make_difference(self, block: WeightBlock) -> DeltaProduct:
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

    def hold_decoded(self) -> None:
        """Have the low-precision weight decoded, as long as the cache keeps it."""
        if self.low is not None and not self.is_full:
            self.shared.cache.get(self._key("decoded"), self.base)

    def hold_packed(self) -> None:
        """Have the effective weight decoded, and packed for `forward`, as long as the cache keeps it."""
        if not self.is_full:  # what full precision reads is not packed
            self.hold_decoded()
            key = self._key("product", "packed")
            self.shared.cache.get(key, lambda: Product(self.dense(), self.bias))

    def hold_difference(self) -> None:
        """Have the product of differences packed, as long as the cache keeps it."""
        if not self.is_full:
            self.difference(self.whole.rows, self.whole.cols)

    def extra_repr(self) -> str:
        """Sizes and precision, for `print(model)`."""
        kind = type(self.low).__name__ if self.low is not None else "full"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"
