"""Which weights stay decoded and packed between batches."""

from __future__ import annotations

from collections.abc import Callable

from pahq_hf.precision import PAHQLinear


class HeldWeights:
    """Keeps decoded and packed weights of live nodes, the least recently used go first.

    Args:
        limit: Bytes they may take together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[PAHQLinear, int] = {}

    def use(self, linear: PAHQLinear, hold: Callable[[PAHQLinear], int]) -> None:
        """Say that a weight is about to be used; hold it if it fits.

        Args:
            linear: The weight.
            hold: Makes it hold what is wanted; returns the bytes that takes.
        """
        self._held.pop(linear, None)
        size = hold(linear)
        self._held[linear] = size
        total = sum(self._held.values())
        while total > self._limit and self._held:
            oldest = next(iter(self._held))
            total -= self._held.pop(oldest)
            oldest.release()

    def release(self) -> None:
        """Free everything."""
        for linear in self._held:
            linear.release()
        self._held.clear()
