"""A weight matrix that is full precision, low precision, in the checkpoint, or low with FP32 blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from pahq_hf.errors import ConfigError
from pahq_hf.precision.formats.in_checkpoint import CheckpointWeight
from pahq_hf.precision.formats.mixed import lowered
from pahq_hf.precision.formats.registry import LowWeight
from pahq_hf.precision.fp32.source import SourceBlock
from pahq_hf.precision.fp32.staging import Staging
from pahq_hf.precision.mode import Mode
from pahq_hf.precision.weight_block import Layout, WeightBlock
from pahq_hf.precision.weight_cache import Key, WeightCache


@dataclass(frozen=True)
class Shared:
    """What all projections of a model share.

    Attributes:
        mode: How projections compute at present.
        staging: The way of FP32 weights from the checkpoint.
    """

    mode: Mode = field(default_factory=Mode)
    staging: Staging = field(default_factory=Staging)

    @property
    def cache(self) -> WeightCache:
        """Decoded weights, and weights packed for products, of who uses the model now."""
        return self.mode.holding.cache

    @property
    def full(self) -> WeightCache:
        """FP32 weights packed for products, which were read from the checkpoint, likewise."""
        return self.mode.holding.full


class WeightMatrix(nn.Module):
    """A weight matrix, [out, in] whatever the checkpoint's layout, and its bias.

    While `weight` is a parameter it is resident in full precision. `lower` replaces it by a low-precision
    tensor plus the place in the checkpoint where FP32 blocks can be read on demand.

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
        self.shared = Shared()
        self.source_block: SourceBlock | None = None  # where FP32 values are read, if not resident
        self._compute = torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.release()  # elsewhere, or in another dtype, decoded and packed values are other ones
        return super()._apply(fn, recurse)

    # -- where it is ----------------------------------------------------------------------------

    def lower(
        self,
        fmt: str | Layout,
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
        layout: Layout = [(self.whole, fmt)] if isinstance(fmt, str) else fmt
        weight: Tensor = self.weight
        if weight.is_meta:
            weight = block.view(self.whole.rows, self.whole.cols)
            weight = weight if device is None else weight.to(device)
        self.low = cast(nn.Module, lowered(weight, layout))
        self.source_block, self.weight = block, None
        self.shared.staging.expect(block)
        self.compute_in(compute)

    def compute_in(self, compute: torch.dtype) -> None:
        """Let products of differences run in another dtype from now on."""
        self.release()
        self._compute = compute

    def leave(self, block: SourceBlock, device: torch.device) -> None:
        """Leave the weight where it is, in the checkpoint, and read what is wanted of it.

        Args:
            block: Where it is.
            device: Where values go.
        """
        self.low = CheckpointWeight(block, (self.out_features, self.in_features), device)
        self.source_block, self.weight = block, None

    @property
    def whole(self) -> WeightBlock:
        """The whole matrix."""
        return WeightBlock(slice(0, self.out_features), slice(0, self.in_features))

    @property
    def is_full(self) -> bool:
        """Whether it is FP32 at present whatever it is kept in."""
        return self.shared.mode.is_full

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as resident now, FP32 blocks in use included."""
        base = self.weight.nbytes if self.weight is not None else cast(LowWeight, self.low).nbytes
        return base + sum(4 * block.size for block, _ in self._raised)

    # -- FP32 blocks ----------------------------------------------------------------------------

    def raise_block(self, block: WeightBlock) -> None:
        """Materialise the FP32 values of a block; the product uses them until `drop_raised`."""
        if self.low is None:
            return
        self.shared.cache.drop(self, "product")
        transfer = self.shared.staging.transfer(self._device)
        values = None if transfer is None else transfer.take(self._key("raised", block=block))
        if values is None:
            values = self._source.view(block.rows, block.cols)  # fails if the checkpoint changed
            # On the CPU no copy is kept: products are packed from the mapped file.
            values = None if self._device.type == "cpu" else values.to(self._device)
        self.shared.mode.holding.raised.setdefault(self, []).append((block, values))

    def prefetch(self, block: WeightBlock) -> None:
        """Let the FP32 values of a block come in the background: into memory, or to the GPU."""
        if self.source_block is None:
            return
        transfer = self.shared.staging.transfer(self._device)
        if transfer is None:
            self.source_block.prefetch()
        else:
            key = self._key("raised", block=block)
            transfer.start(key, lambda: self._source.view(block.rows, block.cols))

    def drop_raised(self) -> None:
        """Free every FP32 block."""
        if self.shared.mode.holding.raised.pop(self, None):
            self.shared.cache.drop(self, "product")

    @property
    def _raised(self) -> Sequence[tuple[WeightBlock, Tensor | None]]:
        """FP32 blocks in use, and their values; None: read when wanted."""
        return self.shared.mode.holding.raised.get(self, ())

    @property
    def is_raised(self) -> bool:
        """Whether FP32 blocks are in use."""
        return bool(self._raised)

    def is_raised_in(self, block: WeightBlock) -> bool:
        """Whether FP32 blocks in use touch a block."""
        return any(raised.intersect(block) is not None for raised, _ in self._raised)

    # -- values ---------------------------------------------------------------------------------

    def dense(self, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """The effective weight of a block at the current precision. [rows, cols]"""
        wanted = WeightBlock(rows or self.whole.rows, cols or self.whole.cols)
        if self.weight is not None or self.is_full:
            return self.exact(wanted.rows, wanted.cols)
        for block, values in self._raised:
            if block.intersect(wanted) == wanted:
                return self._raised_values(block, values, wanted)
        weight, is_stored = self._stored(wanted)
        if self._raised and is_stored:
            weight = weight.clone()  # what is stored stays as it is
        for block, values in self._raised:
            common = block.intersect(wanted)
            if common is not None:
                weight[common.within(wanted)] = self._raised_values(block, values, common)
        return weight

    def base(self, cols: slice | None = None) -> Tensor:
        """The weight as it is stored, without FP32 blocks in use; FP32 in full precision. [out, cols]"""
        if self.weight is not None or self.is_full:
            return self.exact(cols=cols)
        return self._stored(WeightBlock(self.whole.rows, cols or self.whole.cols))[0]

    def exact(self, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """The full-precision weight of a block, whatever the precision at present. [rows, cols]"""
        rows, cols = rows or self.whole.rows, cols or self.whole.cols
        if self.weight is not None:
            return self.weight[rows, cols]
        if self._device.type == "cpu":
            return self._source.read(rows, cols).to(torch.float32)
        return self._stage_full(WeightBlock(rows, cols))

    def _raised_values(self, block: WeightBlock, values: Tensor | None, wanted: WeightBlock) -> Tensor:
        if values is None:
            return self.exact(wanted.rows, wanted.cols)
        return values[wanted.within(block)].to(torch.float32)

    def _stored(self, wanted: WeightBlock) -> tuple[Tensor, bool]:
        """The stored values of a block, in FP32, and whether others use the same memory. [rows, cols]"""
        decoded = self.shared.cache.peek(self._key("decoded"))
        if decoded is not None:
            return decoded[wanted.rows, wanted.cols], True
        return cast(LowWeight, self.low).dense(wanted.rows, wanted.cols), False

    def _stage_full(self, block: WeightBlock) -> Tensor:
        """FP32 values for use at once: the next call may overwrite them. [rows, cols]"""
        return self.shared.staging.stage(self._source, block.rows, block.cols, self._device)

    @property
    def _source(self) -> SourceBlock:
        if self.source_block is None:
            raise ConfigError("this projection is resident in full precision; there is nothing to read")
        return self.source_block

    @property
    def _device(self) -> torch.device:
        low = cast(nn.Module, self.low)
        return next(chain(low.parameters(), low.buffers())).device

    # -- what the cache keeps -------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """Bytes that the cache keeps of this weight."""
        return self.shared.cache.bytes_of(self)

    def release(self) -> None:
        """Free what the cache keeps of this weight."""
        self.shared.cache.drop(self)

    def _key(self, *kind: str, block: WeightBlock | None = None) -> Key:
        """A cache's key for something of this weight."""
        if block is None:
            return (self, *kind)
        return (self, *kind, block.rows.start, block.rows.stop, block.cols.start, block.cols.stop)
