"""The audit of estimated decisions: which are drawn, and what wrong ones among them say of the others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_LEAST = 180  # edges drawn at least if all were estimated: 60 where a third of them are


@dataclass(frozen=True)
class Audit:
    """Draws estimated edges at random.

    An edge is drawn or not whatever else happens, so that a continued search draws the same.

    Attributes:
        share: Of all edges.
        seed: Of the draw.
    """

    share: float
    seed: int = 0

    @classmethod
    def of(cls, share: float, edges: int, seed: int = 0) -> Audit:
        """An audit that draws enough edges to say something.

        Args:
            share: Share of edges that is asked for; 0 for no audit.
            edges: Edges that the search may decide.
            seed: Of the draw.
        """
        return cls(0.0 if share == 0 else min(1.0, max(share, _LEAST / max(1, edges))), seed)

    def drawn(self, reader: int, writers: Iterable[int]) -> list[int]:
        """Edges into a reader that are drawn.

        Args:
            reader: The reader.
            writers: Writers of the edges in question.

        Returns:
            Their writers, ascending.
        """
        wanted = sorted(writers)
        if not wanted or self.share == 0:
            return []
        draws = np.random.default_rng([self.seed, reader]).random(wanted[-1] + 1)
        return [writer for writer in wanted if draws[writer] < self.share]


def most_wrong(audited: int, wrong: int, confidence: float = CONFIDENCE) -> float:
    """Upper confidence limit of the share of wrong decisions (Clopper and Pearson 1934), one-sided.

    Args:
        audited: Decisions that were drawn and tested.
        wrong: Wrong ones among them.
        confidence: Probability that the limit holds.

    Returns:
        The share at which `wrong` or fewer of `audited` come up with probability `1 - confidence`; 1 if
        nothing was audited.
    """
    if wrong >= audited:
        return 1.0
    low, high = wrong / audited, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if _at_most(wrong, audited, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(successes: int, tries: int, share: float) -> float:
    """Probability of at most so many successes, of independent tries. 0 < share < 1"""
    if share >= 1:
        return 0.0
    log_p, log_q = math.log(share), math.log1p(-share)
    whole = math.lgamma(tries + 1)
    logs = (
        whole - math.lgamma(k + 1) - math.lgamma(tries - k + 1) + k * log_p + (tries - k) * log_q
        for k in range(successes + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))
