"""What one user of a model holds of its weights."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from pahq_hf.precision.weight_block import WeightBlock
from pahq_hf.precision.weight_cache import WeightCache


@dataclass(eq=False)
class Holding:
    """Components in FP32, and weights decoded, packed or read for another use, within bounds of their own.

    A model has one, for whoever runs it as it is; so has every engine, which puts its own in place inside its
    calls (`Mode.using`). So nobody computes with what another one raised, packed or let go.

    Attributes:
        active: Components in FP32.
        raised: Their blocks, by projection; values are None where they are read when wanted.
        cache: Decoded weights, and weights packed for products.
        full: FP32 weights packed for products, which were read from the checkpoint; none by default.
    """

    active: frozenset[str] = frozenset()
    raised: dict[Hashable, list[tuple[WeightBlock, Tensor | None]]] = field(default_factory=dict)
    cache: WeightCache = field(default_factory=WeightCache)
    full: WeightCache = field(default_factory=lambda: WeightCache(0))

    def release(self) -> None:
        """Free the weights that stayed for another use."""
        self.cache.clear()
        self.full.allow(0)

    def clear(self) -> None:
        """Hold nothing."""
        self.release()
        self.raised.clear()
        self.active = frozenset()
