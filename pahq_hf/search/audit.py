"""The audit of estimated decisions: which are drawn (what they say of the others: `EstimateFacts`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

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
