"""What `refine` is asked for: the best circuit of a size, the smallest within a gap, or a ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pahq_hf.search.course import Beginning, Judged, Passed
from pahq_hf.search.rounds import GAIN, NOTHING, Scale


@dataclass(frozen=True)
class Goal:
    """One of three: a size, a gap, or neither of them, which ranks all edges.

    Attributes:
        edges: How many edges the circuit has at most.
        max_gap: How far its metric may be from the full model's, as a share of how far that of no edges is.
        word: What is counted, as a run is told from others: edges, or nodes.
    """

    edges: int | None = None
    max_gap: float | None = None
    word: str = "edge"

    @property
    def is_ranking(self) -> bool:
        """Whether circuits of all sizes are asked for."""
        return self.edges is None and self.max_gap is None

    @property
    def name(self) -> str | None:
        """What tells the run from others in a log; None where all edges are kept whatever comes out."""
        if self.edges is not None:
            return f"{self.edges} {self.word}s"
        return None if self.max_gap is None else f"refine, gap up to {self.max_gap:g}"

    def is_within(self, beginning: Beginning, passed: Judged) -> bool:
        """Whether a circuit is as near as is asked for, by what judges it; any is where a size is."""
        bound = self.bound(beginning.judge)
        return bound is None or beginning.gap(passed) <= bound

    def bound(self, scale: Scale) -> float | None:
        """How large a gap may be, rounding at least; None where any may."""
        return None if self.max_gap is None else max(self.max_gap, NOTHING) * scale.whole

    def may_lose(self, beginning: Beginning, best: Judged, bare: Judged) -> bool:
        """Whether a circuit may lose edges that do nothing each: all of them may do a little together.

        Args:
            beginning: The scales.
            best: The circuit.
            bare: Without them.
        """
        if not beginning.is_near(best, bare):
            return False
        return self.max_gap is None or beginning.gap(bare) <= max(self.max_gap, GAIN) * beginning.judge.whole

    def is_given_up(self, beginning: Beginning, passed: Sequence[Passed], patience: int) -> bool:
        """Whether so many rounds at the size have brought nothing on the pairs that judge.

        Args:
            beginning: The scales.
            passed: The circuits so far.
            patience: How many rounds; 0 never gives up.
        """
        if self.edges is None or not patience or beginning.validation is None:
            return False
        gaps = [beginning.gap(each) for each in passed if each.size <= self.edges]
        return bool(gaps) and len(gaps) - 1 - gaps.index(min(gaps)) >= patience

    def best(self, beginning: Beginning, passed: Sequence[Passed]) -> int | None:
        """Which circuit is kept: the nearest of the size, or the smallest within the gap.

        Of circuits of the size that are equal within rounding it is the last.

        Returns:
            Its number; None where a ranking is asked for, or no edges at all are nearer.
        """
        numbers = reversed(range(len(passed)))
        if self.edges is not None:
            fitting = [number for number in numbers if passed[number].size <= self.edges]
            gaps = {number: beginning.gap(passed[number]) for number in fitting}
            least, whole = min(gaps.values(), default=math.inf), beginning.judge.whole
            smallest = beginning.judge.gap(beginning.judge.smallest)
            near = [number for number in fitting if gaps[number] <= least + NOTHING * whole]
            return near[0] if near and least <= smallest else None
        within = [number for number in numbers if self.is_within(beginning, passed[number])]
        if self.is_ranking or not within:
            return None
        return min(within, key=lambda number: (passed[number].size, beginning.gap(passed[number])))
