"""Which weights stay decoded and packed between batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pahq_hf.memory import trim
from pahq_hf.precision import PAHQLinear

_TRIM = 64 << 20  # freed bytes that are given back to the system


class HeldWeights:
    """Keeps decoded and packed weights of live nodes.

    Where they do not all fit, those of earlier turns go first, from the oldest; then the newest: weights
    are used in a circle, and whoever lets the oldest go in a circle keeps nothing.

    Args:
        limit: Bytes they may take together.
        linears: All weights there are.
    """

    def __init__(self, limit: int, linears: Iterable[PAHQLinear]) -> None:
        self._limit = limit
        self._linears = list(linears)
        # Whether all weights together, in FP32, would not fit.
        self.is_tight = sum(4 * w.in_features * w.out_features for w in self._linears) > limit
        self._held: dict[PAHQLinear, int] = {}
        self._used: dict[PAHQLinear, int] = {}  # in which turn
        self._turn = 0
        self._freed = 0

    def turn(self) -> None:
        """Begin with another reader."""
        self._turn += 1

    def use(self, linear: PAHQLinear, hold: Callable[[PAHQLinear], int]) -> None:
        """Say that a weight is about to be used; hold it if it fits.

        Args:
            linear: The weight.
            hold: Makes it hold what is wanted; returns the bytes that takes.
        """
        self._held.pop(linear, None)
        self._held[linear] = hold(linear)
        self._used[linear] = self._turn
        self._shrink()

    def settle(self) -> None:
        """Take into account what weights packed for themselves since they were last held."""
        for linear in self._linears:
            size = linear.held_bytes
            if not size:
                self._held.pop(linear, None)
                continue
            if linear not in self._held:
                self._used[linear] = self._turn
            self._held[linear] = size
        self._shrink()

    def _shrink(self) -> None:
        total = sum(self._held.values())
        while total > self._limit and self._held:
            oldest, newest = next(iter(self._held)), next(reversed(self._held))
            victim = oldest if self._used[oldest] < self._turn else newest
            size = self._held.pop(victim)
            total -= size
            self._freed += size
            victim.release()
        if self._freed > _TRIM:  # blocks of many sizes: what is freed would not be used again
            self._freed = 0
            trim()

    def release(self) -> None:
        """Free everything."""
        for linear in self._linears:
            linear.release()
        self._held.clear()
