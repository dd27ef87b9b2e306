"""How many candidates a search tries at once."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class BatchSize(Protocol):
    """Chooses how many candidates to try at once."""

    def next(self, remaining: int, keep_rate: float) -> int:
        """Size of the next batch.

        Args:
            remaining: Edges of the reader not decided yet.
            keep_rate: Estimated probability that the next edge stays.

        Returns:
            At least 1, at most `remaining`.
        """


class FixedBatch:
    """Always the same number of candidates; 1 is the plain sequential loop.

    Args:
        size: Candidates per batch.
    """

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def next(self, remaining: int, keep_rate: float) -> int:
        """Size of the next batch."""
        return min(self.size, remaining)


class AdaptiveBatch:
    """The batch that costs least per decided edge.

    A batch of K candidates costs `overhead + K` (in units of one candidate's cost) and decides
    `(1 - (1 - p)^K) / p` edges on average when each stays with probability p: what comes after the
    first edge that stays has to be tried again. The choice depends on decisions alone, not on a clock,
    so a run repeats to the bit.

    Args:
        most: Largest batch.
        overhead: Cost of a batch beside its candidates.
    """

    def __init__(self, most: int = 64, overhead: float = 4.0) -> None:
        self._sizes = np.arange(1, most + 1)
        self._costs = overhead + self._sizes

    def next(self, remaining: int, keep_rate: float) -> int:
        """Size of the next batch."""
        p = min(max(keep_rate, 1e-6), 1 - 1e-6)
        decided = (1 - (1 - p) ** self._sizes) / p
        return min(int(self._sizes[np.argmin(self._costs / decided)]), remaining)
