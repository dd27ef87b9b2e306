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
        bend: Slopes may move by so many tau, all together, between two measured circuits: what moves more may
            hide errors that cancel.
        heavy: An edge that carries so much of what an interval carries, squared, is tested where slopes move.
        few: So many edges are tested one by one: they cost less than slopes.
        together: Circuits of an interval that are measured at once.
    """

    margin: float = 0.5
    residual: float = 0.34
    bend: float = 1.0
    heavy: float = 0.1
    few: int = 6
    together: int = 16


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


@dataclass(frozen=True)
class End:
    """A measured circuit at an end of an interval.

    Attributes:
        position: The reader's edges before it are decided there.
        value: Its metric.
        slopes: Of the reader's edges; NaN where they were decided before. [edges]
    """

    position: int
    value: float
    slopes: Floats


@dataclass(frozen=True)
class Stop:
    """A place inside an interval where the circuit is measured.

    Attributes:
        place: So many of its edges are gone there.
        is_test: Whether the next edge is tested there.
    """

    place: int
    is_test: bool


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
        self._sizes: dict[int, float] = {}  # writer -> length of what its edge carries
        self._ends: list[End] = []  # the same where the next intervals end, as far as it is known
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
        """Measure slopes here, and with them where the next intervals would end."""
        size = min(int(self._reach), len(self._edges) - self._position)
        here, *self._ends = self._ends_of([0, *self._halves(size)])
        self._slopes = here.slopes
        self._measured = True

    def _next_end(self, size: int) -> End:
        """The end of the next interval, measured now if it is not known: half way first."""
        self._ends = [end for end in self._ends if self._position < end.position <= self._position + size]
        if not self._ends:
            self._ends = self._ends_of(self._halves(size))
        return self._ends.pop(0)

    def _halves(self, size: int) -> list[int]:
        """Slopes may be steeper on the way than at both ends: an interval is cut in two."""
        return [size // 2, size] if size >= 2 * self._rule.few else [size]

    def _ends_of(self, sizes: Sequence[int]) -> list[End]:
        """Measure circuits with so many of the next edges gone."""
        ahead = self._edges[self._position :]
        found = self._slopes_of([[*self._removed, *ahead[:size]] for size in sizes])
        return [End(self._position + size, *own) for size, own in zip(sizes, found, strict=True)]

    def _slopes_of(self, circuits: Sequence[Sequence[int]]) -> list[tuple[float, Floats]]:
        """Metrics of circuits, and slopes of the edges that are not decided; NaN for others. Each [edges]"""
        found = self._engine.slopes(self._reader, circuits, self._edges[self._position :])
        self._gradients += len(circuits)
        self._sizes.update(zip(found.writers, found.sizes.tolist(), strict=True))
        slopes = np.full((len(circuits), len(self._edges)), np.nan)
        slopes[:, self._position :] = found.effects
        return list(zip(found.trial.values, slopes, strict=True))

    def _may_stay(self, scores: Floats) -> NDArray[np.bool_]:
        size = np.abs(scores) if self._config.absolute else scores
        return np.asarray(size >= (1 - self._rule.margin) * self._config.threshold)

    def _test(self, count: int) -> None:
        """Test the next edges, up to the first that stays."""
        before, gone, kept = self._cur, len(self._removed), len(self._kept)
        self._try_batch(count)
        self._reach = max(self._reach, 4.0 * self._rule.few)
        if len(self._kept) > kept:
            self._ends = []  # the way goes on without this edge
        if len(self._removed) > gone:
            self._measured = False
            if abs(self._cur - before) > self._rule.residual * self._config.threshold:
                self._slopes = None

    # -- intervals --------------------------------------------------------------------------------

    def _take(self, size: int) -> None:
        """Decide as many of the next edges as estimates allow."""
        first, gone, start = self._position, len(self._removed), self._slopes
        assert start is not None
        end = self._next_end(size)
        size = end.position - first
        inside = slice(first, end.position)
        edges = self._edges[inside]
        estimates = Estimates.between(start[inside], end.slopes[inside])
        stops = self._stops(estimates, np.array([self._sizes[writer] for writer in edges]))
        measured = self._measured_stops(edges, stops[: self._rule.together])
        done, share, goes_on = 0, 0.0, True
        for stop, prefix, without in measured:
            goes_on = self._go(estimates, edges, slice(done, stop.place), prefix)
            if not goes_on:
                break
            done = stop.place
            if stop.is_test:
                goes_on = not self._decide(edges[done], without)
                self._position += 1
                done += 1
            share = float(estimates.reached[done - 1]) if done else 0.0
            if not goes_on:
                self._ends = []
                break
        goes_on = goes_on and len(stops) == len(measured)
        all_went = goes_on and self._go(estimates, edges, slice(done, size), end.value)
        if all_went:
            done, share = size, 1.0
        if len(self._removed) > gone:
            self._engine.cut(self._reader, self._removed)
        if done == 0:
            return
        self._report(self._position - first)
        # If all went, slopes here are those at the end; else those that the way had here.
        self._slopes = start + (end.slopes - start) * share
        self._measured = all_went

    def _stops(self, estimates: Estimates, sizes: Floats) -> list[Stop]:
        """Where circuits of an interval are measured.

        Edges are tested that may stay, and where slopes move also those that carry much: they bend the way by
        themselves. Others are measured before slopes move too far.
        """
        highest = estimates.furthest if self._config.absolute else estimates.highest
        hot = self._may_stay(highest)
        moved = np.abs(estimates.end - estimates.start)
        allowed = self._rule.bend * self._config.threshold
        if float(moved.sum()) > allowed:
            hot |= sizes**2 >= self._rule.heavy * float((sizes**2).sum())
        found, total = [], 0.0
        for place in range(len(moved)):
            if hot[place]:
                found.append(Stop(place, True))
                total = 0.0
                continue
            total += float(moved[place])
            if total > allowed and place + 1 < len(moved):
                if not hot[place + 1]:
                    found.append(Stop(place + 1, False))
                total = 0.0
        return found

    def _measured_stops(self, edges: Sequence[int], stops: Sequence[Stop]) -> list[tuple[Stop, float, float]]:
        """Measure circuits of an interval, with all edges before each stop gone, and without its own too."""
        candidates = []
        for stop in stops:
            candidates += [[*self._removed, *edges[: stop.place]]] if stop.place else []
            candidates += [[*self._removed, *edges[: stop.place + 1]]] if stop.is_test else []
        if not candidates:
            return []
        values = iter(self._engine.try_(self._reader, candidates).values)
        measured = []
        for stop in stops:
            prefix = next(values) if stop.place else self._cur
            measured.append((stop, prefix, next(values) if stop.is_test else prefix))
        return measured

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
        self._slopes, self._ends = None, []

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
