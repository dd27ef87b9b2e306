"""Deciding the edges of one reader by intervals whose ends are measured (docs/verified-estimates.md).

Most edges go. Many at once are taken out, in order, and the metric and its slopes are measured at both ends
of that interval; from them follows an estimate of every score inside. In the order of ACDC:

1. Slopes at the current circuit say how far the next interval reaches: to the first edge that may stay.
2. Value and slopes at its end; the estimate of an edge lies between its slopes at both ends.
3. An edge whose estimate comes near the threshold is tested, from a measured circuit and to a measured one.
4. What lies between measured circuits goes if its estimates add up to what the metric moved by; else the
   interval is cut.

Ends are measured, so estimates never add up to a drift. A few edges are tested as without intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pahq_hf.search.reader_search import Deciding, Look, ReaderSearch
from pahq_hf.search.state import Counts, ReaderRecord

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class IntervalRule:
    """When estimates decide: chosen by measurement (docs/verified-estimates.md).

    Attributes:
        margin: m; an edge is tested if it may score (1 - m) tau or more.
        residual: r; estimates may miss what the metric moved by, in all, by r tau.
        few: So many edges are tested one by one: they cost less than slopes.
        together: Edges of an interval that are tested at once.
    """

    margin: float = 0.3
    residual: float = 0.34
    few: int = 6
    together: int = 8


@dataclass(frozen=True)
class Estimates:
    """Scores of edges that go one after the other, from slopes at both ends.

    Attributes:
        start: Slopes where the first of them goes. [edges]
        end: Slopes where all are gone. [edges]
        scores: Estimates. [edges]
        reached: How far along the way each edge goes, from 0 to 1. [edges]
    """

    start: Floats
    end: Floats
    scores: Floats
    reached: Floats

    @classmethod
    def between(cls, start: Floats, end: Floats) -> Estimates:
        """Estimate scores.

        Slopes change by what went before. Where that is one direction (a curvature of rank one), the change
        of an edge's slope is to that of all as the edge's own share in it; else each edge takes an equal one.
        """
        moved = end - start
        total = float(moved.sum())
        if abs(total) > 0.5 * float(np.abs(moved).sum()):
            reached = np.clip((np.cumsum(moved) - moved / 2) / total, 0.0, 1.0)
        else:
            reached = (np.arange(len(moved)) + 0.5) / max(1, len(moved))
        return cls(start, end, start + moved * reached, reached)

    @property
    def highest(self) -> Floats:
        """The largest score each edge may have. [edges]"""
        return np.maximum(self.scores, np.maximum(self.start, self.end))

    @property
    def furthest(self) -> Floats:
        """The largest magnitude each score may have. [edges]"""
        return np.maximum(np.abs(self.scores), np.maximum(np.abs(self.start), np.abs(self.end)))

    def adding_up(self, some: slice, change: float) -> Floats:
        """Some estimates, corrected to add up to what the metric moved by, most where slopes moved most."""
        scores = self.scores[some]
        weight = np.abs(self.end - self.start)[some]
        total = float(weight.sum())
        share = weight / total if total > 0 else np.full(len(scores), 1 / max(1, len(scores)))
        corrected: Floats = scores + (change - float(scores.sum())) * share
        return corrected


class IntervalSearch(ReaderSearch):
    """Decides the edges of one reader as `ReaderSearch` does, most by estimates.

    Args:
        work: What it is given.
        rule: When estimates decide.
    """

    def __init__(self, work: Deciding, rule: IntervalRule | None = None) -> None:
        super().__init__(work)
        self._rule = rule or IntervalRule()
        self._audit = work.audit
        self._slopes: Floats | None = None  # of all edges from `position` on, at the current circuit
        self._end: tuple[int, float, Floats] | None = None  # the same where so many more are gone, if known
        self._measured = False  # whether they are, and not interpolated
        self._reach = float(len(self._edges))  # how long an interval may be
        self._estimated: set[int] = set()
        self._audited: set[int] = set()
        self._gradients = self._wrong = 0

    def _advance(self) -> None:
        left = len(self._edges) - self._position
        if left < self._rule.few:
            self._test(left)
            return
        if self._slopes is None:
            self._begin()
        assert self._slopes is not None
        hot = np.flatnonzero(self._may_stay(self._slopes[self._position :]))
        size = min(int(hot[0]) if len(hot) else left, int(self._reach))
        if size < self._rule.few:
            self._test(min(size + 1, left))
        else:
            self._take(size)

    def _record(self) -> ReaderRecord:
        estimated = tuple(sorted(self._estimated))
        counts = Counts(self._gradients, len(self._audited), self._wrong)
        return replace(super()._record(), estimated=estimated, counts=counts)

    # -- what is measured -------------------------------------------------------------------------

    def _begin(self) -> None:
        """Measure slopes here, and with them where the longest interval would end."""
        size = min(int(self._reach), len(self._edges) - self._position)
        ahead = self._edges[self._position : self._position + size]
        (_, self._slopes), end = self._slopes_of([self._removed, [*self._removed, *ahead]])
        self._measured, self._end = True, (size, *end)

    def _slopes_of(self, circuits: Sequence[Sequence[int]]) -> list[tuple[float, Floats]]:
        """Metrics of circuits, and slopes of the edges that are not decided; NaN for others. Each [edges]"""
        found = self._engine.slopes(self._reader, circuits, self._edges[self._position :])
        self._gradients += len(circuits)
        slopes = np.full((len(circuits), len(self._edges)), np.nan)
        slopes[:, self._position :] = found.effects
        return list(zip(found.trial.values, slopes, strict=True))

    def _may_stay(self, scores: Floats) -> NDArray[np.bool_]:
        size = np.abs(scores) if self._config.absolute else scores
        return np.asarray(size >= (1 - self._rule.margin) * self._config.threshold)

    def _test(self, count: int) -> None:
        """Test the next edges, up to the first that stays."""
        before, gone = self._cur, len(self._removed)
        self._try_batch(count)
        self._reach = max(self._reach, 4.0 * self._rule.few)
        if len(self._removed) > gone:
            self._measured, self._end = False, None
            if abs(self._cur - before) > self._rule.residual * self._config.threshold:
                self._slopes = None

    # -- intervals --------------------------------------------------------------------------------

    def _take(self, size: int) -> None:
        """Decide as many of the next edges as estimates allow."""
        first, gone, start = self._position, len(self._removed), self._slopes
        assert start is not None
        edges = self._edges[first : first + size]
        known, self._end = self._end, None
        if known is not None and known[0] == size:
            _, value, end = known
        else:
            ((value, end),) = self._slopes_of([[*self._removed, *edges]])
        inside = slice(first, first + size)
        estimates = Estimates.between(start[inside], end[inside])
        highest = estimates.furthest if self._config.absolute else estimates.highest
        hot = np.flatnonzero(self._may_stay(highest)).tolist()
        tests = self._tests(edges, hot[: self._rule.together])
        # Every stop is a measured circuit on the way; without tests beyond, the last is the interval's end.
        done, share = 0, 0.0
        goes_on = True
        for place, prefix, without in tests:
            goes_on = self._go(estimates, edges, slice(done, place), prefix)
            if not goes_on:
                break
            stays = self._decide(edges[place], without)
            self._position += 1
            done, share = place + 1, float(estimates.reached[place])
            if stays:
                goes_on = False
                break
        goes_on = goes_on and len(hot) == len(tests)
        if goes_on and self._go(estimates, edges, slice(done, size), value):
            done, share = size, 1.0
        if len(self._removed) > gone:
            self._engine.cut(self._reader, self._removed)
        if done == 0:
            return
        self._report(self._position - first)
        on_the_way = start + (end - start) * share
        self._slopes, self._measured = on_the_way, done == size and not tests

    def _tests(self, edges: Sequence[int], places: Sequence[int]) -> list[tuple[int, float, float]]:
        """Test edges of an interval, all before each gone: place, and the metric with it and without it."""
        if not places:
            return []
        candidates = []
        for place in places:
            if place:
                candidates.append([*self._removed, *edges[:place]])
            candidates.append([*self._removed, *edges[: place + 1]])
        values = iter(self._engine.try_(self._reader, candidates).values)
        return [(place, next(values) if place else self._cur, next(values)) for place in places]

    def _go(self, estimates: Estimates, edges: Sequence[int], some: slice, value: float) -> bool:
        """Let edges between two measured circuits go, if their estimates add up to what the metric moved by.

        Args:
            estimates: Of the interval.
            edges: Its writers.
            some: Which of them.
            value: The metric without them.

        Returns:
            Whether they go; if not, the next interval is shorter.
        """
        size = some.stop - some.start
        if size == 0:
            return True
        change, allowed = value - self._cur, self._rule.residual * self._config.threshold
        missed = abs(change - float(estimates.scores[some].sum()))
        scores = estimates.adding_up(some, change)
        # What two slopes leave out grows with the third power of the length.
        longer = 0.9 * (allowed / max(missed, 1e-9 * allowed, 1e-300)) ** (1 / 3)
        if missed > allowed or any(map(self._config.stays, scores.tolist())):
            self._reach = size * min(max(longer, 0.1), 0.5)
            if not self._measured:
                self._slopes = None
            return False
        self._reach = max(self._reach, size * min(max(longer, 1.0), 8.0))
        for writer, score in zip(edges[some], scores.tolist(), strict=True):
            self._scores[writer] = score
            self._removed.append(writer)
        if size > 1:  # one edge between two measured circuits is tested
            self._estimated.update(edges[some])
        self._position += size
        self._cur = value
        return True

    def _return_to(self, look: Look) -> None:
        super()._return_to(look)
        self._estimated.intersection_update(self._scores)
        self._estimated.discard(self._edges[look.position])
        self._slopes = self._end = None

    # -- the audit --------------------------------------------------------------------------------

    def _is_done(self) -> bool:
        """Test some estimated edges, each in its own circuit, and go back to the first that was wrong."""
        order = {writer: number for number, writer in enumerate(self._removed)}
        drawn = self._audit.drawn(self._reader, self._estimated - self._audited)
        drawn.sort(key=order.__getitem__)
        if not drawn:
            return True
        candidates: list[list[int]] = []
        for writer in drawn:
            candidates += [self._removed[: order[writer]], self._removed[: order[writer] + 1]]
        values = self._engine.try_(self._reader, candidates).values
        for number, writer in enumerate(drawn):
            cur, new = values[2 * number], values[2 * number + 1]
            self._audited.add(writer)
            if self._is_near(new - cur):
                self._looks += 1
                again = self._engine.look_again(self._reader, candidates[2 * number : 2 * number + 2])
                cur, new = again.values
            if self._config.stays(new - cur):
                self._wrong += 1
                self._scores[writer] = new - cur
                self._engine.cut(self._reader, self._removed[: order[writer]])
                self._return_to(Look(self._edges.index(writer), order[writer], cur, new, False))
                return False
        return True
