"""Deciding the edges of one reader by estimates that are measured on the way (docs/verified-estimates.md).

Most edges go. What removing one would add is told by slopes, so where the next edges lead is known before
they are decided. In the order of ACDC:

1. Slopes are measured at the current circuit and further along the way that they foretell, at more circuits
   where they move more (`way.Way`). The estimate of an edge lies between its slopes at both sides.
2. The metric is measured on the way, at many circuits at once: before and after each edge that may stay, and
   so often that errors of estimates have no room to cancel.
3. From there on decisions follow. An edge that may stay is decided by its test. Others go if estimates
   between two measured circuits add up to what the metric moved by; else it is measured closer together.
4. An edge that is decided otherwise than foretold leads to another way, and circuits are measured anew.

The metric is measured at both sides of all that is estimated, so estimates never add up to a drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pahq_hf.search.reader_search import Deciding, Look, ReaderSearch
from pahq_hf.search.state import Counts, ReaderRecord
from pahq_hf.search.way import Bools, Estimates, Floats, IntervalRule, Point, Stop, Way, shares, spread


@dataclass(frozen=True)
class Place:
    """A circuit on the way.

    Attributes:
        position: The reader's edges before it are decided as foretold.
        without: Whether the next edge, which is foretold to stay, is gone too.
    """

    position: int
    without: bool = False


@dataclass
class Ahead:
    """What is known of the circuits ahead.

    Attributes:
        way: The way.
        values: Metrics of circuits on it, as long as all is decided as foretold.
        missed: By how much edges that were decided otherwise missed what was foretold. Slopes ahead were
            measured at other circuits then.
    """

    way: Way
    values: dict[Place, float] = field(default_factory=dict)
    missed: float = 0.0


class IntervalSearch(ReaderSearch):
    """Decides the edges of one reader as `ReaderSearch` does, most by estimates.

    Args:
        work: What it is given.
        rule: When estimates decide.
    """

    def __init__(self, work: Deciding, rule: IntervalRule | None = None) -> None:
        super().__init__(work)
        self._rule = rule or IntervalRule()
        self._drawn = frozenset(work.audit.drawn(self._reader, self._edges))
        self._sizes: Floats = np.zeros(len(self._edges))  # how much edges carry, once slopes were measured
        self._ahead: Ahead | None = None
        self._tested = np.zeros(len(self._edges), dtype=bool)  # edges to be tested because sums missed
        self._measured = np.zeros(len(self._edges), dtype=bool)  # and where the metric is, too
        self._together = self._rule.together  # circuits to measure at once
        self._estimated: set[int] = set()
        self._audited: set[int] = set()
        self._wrong: set[int] = set()  # those of the audited that stay
        self._gradients = 0

    def _advance(self) -> None:
        left = len(self._edges) - self._position
        if left < self._rule.few:
            self._ahead = None
            self._try_batch(left)
            return
        self._follow(self._ahead or self._look_ahead())

    def _record(self) -> ReaderRecord:
        self._engine.cut(self._reader, self._removed)
        estimated = tuple(sorted(self._estimated))
        counts = Counts(self._gradients, len(self._audited), len(self._wrong))
        return replace(super()._record(), estimated=estimated, counts=counts)

    # -- slopes along the way ---------------------------------------------------------------------

    def _look_ahead(self) -> Ahead:
        """Measure slopes along the way on which the next edges are expected to be decided."""
        first, threshold = self._position, self._config.threshold
        last = len(self._edges)
        stays = np.zeros(len(self._edges), dtype=bool)
        ahead = Ahead(Way((), stays))
        points = self._points(ahead, [first, last])
        for _ in range(self._rule.rounds):
            ahead.way = Way(tuple(points), stays)
            scores = ahead.way.estimates().scores
            stays, before = self._expected(scores, stays), stays
            places = ahead.way.gaps(self._rule, threshold)
            changed = np.flatnonzero(stays != before)
            if len(changed):  # circuits behind the first of them are others
                ahead.values = {p: v for p, v in ahead.values.items() if p.position <= changed[0]}
                ahead.missed = float(np.abs(scores[changed]).sum())
                if ahead.missed > self._rule.far * threshold:
                    points = [point for point in points if point.position <= changed[0]]
                    places = spread(points[-1].position, last, 3)
                    ahead.missed = 0.0
            if not places:
                break
            ahead.way = Way(tuple(points), stays)
            points = sorted([*points, *self._points(ahead, places)], key=lambda point: point.position)
        ahead.way = Way(tuple(points), stays)
        self._ahead = ahead
        return ahead

    def _expected(self, scores: Floats, before: Bools) -> Bools:
        """Which edges stay if their scores are these; where that is not known, as before. [edges]"""
        size = np.abs(scores) if self._config.absolute else scores
        return np.where(np.isnan(scores), before, size >= self._config.threshold)

    def _points(self, ahead: Ahead, positions: Sequence[int]) -> list[Point]:
        """Measure slopes of undecided edges, and the metric, at some circuits of a way."""
        places = [Place(position) for position in positions]
        found = self._engine.slopes(
            self._reader, [self._circuit(ahead.way, place) for place in places], self._edges[self._position :]
        )
        self._gradients += len(positions)
        self._sizes[self._position :] = found.sizes
        slopes = np.full((len(positions), len(self._edges)), np.nan)
        slopes[:, self._position :] = found.effects
        ahead.values.update(zip((self._same(ahead.way, p) for p in places), found.trial.values, strict=True))
        return [Point(*one) for one in zip(positions, slopes, strict=True)]

    def _circuit(self, way: Way, place: Place) -> list[int]:
        """Writers of the edges that are gone there."""
        ahead = range(self._position, place.position)
        gone = [self._edges[k] for k in ahead if not way.stays[k]]
        return [*self._removed, *gone, *([self._edges[place.position]] if place.without else [])]

    # -- taking it --------------------------------------------------------------------------------

    def _follow(self, ahead: Ahead) -> None:
        """Decide the next edges as far as circuits are measured at once."""
        first, estimates = self._position, ahead.way.estimates()
        alone = ahead.way.heavy(self._sizes, self._rule, self._config.threshold)
        stops = self._next_stops(ahead.way, estimates, alone)
        values = self._values(ahead, stops)
        for stop in stops:
            if not self._go(estimates, alone, stop.place, values):
                break
            if stop.is_test and not self._decide_as_foretold(ahead, estimates, values):
                break
        else:
            self._together = min(self._rule.together, 2 * self._together)
        self._report(self._position - first)

    def _next_stops(self, way: Way, estimates: Estimates, alone: Bools) -> list[Stop]:
        """The next circuits to measure: some at once, fewer where edges may be decided another way."""
        tau = self._config.threshold
        highest = estimates.furthest if self._config.absolute else estimates.highest
        weighty = shares(self._sizes) >= self._rule.weighty
        margin = np.where(weighty, self._rule.wary, self._rule.margin)
        tested = ~(highest < (1 - margin) * tau)  # slopes that are no numbers say nothing
        tested |= way.stays | self._tested
        found, circuits, doubtful = [], 0, 0
        for stop in way.stops(self._position, tested, alone, self._measured, self._rule, tau):
            found.append(stop)
            circuits += 1 + stop.is_test
            score = estimates.scores[stop.place] if stop.is_test else 0.0
            doubtful += abs((abs(score) if self._config.absolute else score) - tau) < self._rule.doubts * tau
            if circuits >= self._together or doubtful >= 2:
                break
        return found

    def _values(self, ahead: Ahead, stops: Sequence[Stop]) -> dict[Place, float]:
        """Metrics at some stops, without the edges tested there, and around edges that are drawn."""
        wanted: dict[Place, None] = {}
        at = self._position
        for stop in stops:
            for position in range(at, stop.place):
                if self._edges[position] in self._drawn:
                    wanted |= {Place(position): None, Place(position + 1): None}
            wanted[Place(stop.place)] = None
            at = stop.place + stop.is_test
            if stop.is_test:
                wanted[self._tested_at(ahead.way, stop.place)] = None
        ahead.values[Place(self._position)] = self._cur
        places = dict.fromkeys(self._same(ahead.way, place) for place in wanted)
        missing = [place for place in places if place not in ahead.values]
        if missing:
            trial = self._engine.try_(self._reader, [self._circuit(ahead.way, place) for place in missing])
            ahead.values.update(zip(missing, trial.values, strict=True))
        return {place: ahead.values[self._same(ahead.way, place)] for place in wanted}

    def _same(self, way: Way, place: Place) -> Place:
        """The first place of the same circuit: edges that stay change nothing."""
        position = place.position
        if place.without:
            return place
        while position > self._position and way.stays[position - 1]:
            position -= 1
        return Place(position)

    def _tested_at(self, way: Way, position: int) -> Place:
        """The circuit without the next edge, too."""
        return Place(position, True) if way.stays[position] else Place(position + 1)

    def _decide_as_foretold(self, ahead: Ahead, estimates: Estimates, values: dict[Place, float]) -> bool:
        """Decide the next edge by its test. Returns whether the way goes on as it was foretold."""
        place, way = self._position, ahead.way
        stays = self._decide(self._edges[place], values[self._tested_at(way, place)])
        self._position += 1
        if stays == bool(way.stays[place]):
            return True
        # On another way now; slopes ahead still tell, unless this edge is far from what was foretold.
        self._together = max(self._rule.few, self._together // 2)
        missed = ahead.missed + abs(self._scores[self._edges[place]] - float(estimates.scores[place]))
        changed = way.stays.copy()
        changed[place] = stays
        near = missed <= self._rule.far * self._config.threshold
        self._ahead = Ahead(Way(way.points, changed), missed=missed) if near else None
        return False

    def _go(self, estimates: Estimates, alone: Bools, place: int, values: dict[Place, float]) -> bool:
        """Let edges between two measured circuits go, if their estimates add up to what the metric moved by.

        Args:
            estimates: Of all edges.
            alone: Edges of which there is one between two measured circuits at most. [edges]
            place: Up to which edge.
            values: Metrics on the way.

        Returns:
            Whether they go, and those that were drawn rightly so. If the sum misses, the metric is to be
            measured at more circuits between; where few edges are left, at all.
        """
        first = self._position
        some, size = slice(first, place), place - first
        if size == 0:
            return True
        value = values[Place(place)]
        change, allowed = value - self._cur, self._rule.residual * self._config.threshold
        missed = abs(change - float(estimates.scores[some].sum()))
        scores = estimates.adding_up(some, change)
        if not missed <= allowed or any(map(self._config.stays, scores.tolist())):
            lone = alone[some] & ~self._tested[some]
            if size <= self._rule.few:
                self._tested[some] = True
            elif lone.any():  # most likely its own step bent the way
                self._tested[some] |= lone
            else:
                self._measured[spread(first, place, self._rule.cut)[:-1]] = True
            return False
        before, edges = self._cur, self._edges[some]
        for writer, score in zip(edges, scores.tolist(), strict=True):
            self._scores[writer] = score
            self._removed.append(writer)
        self._position = place
        self._cur = value
        if size == 1:  # one edge between two measured circuits is tested
            if self._is_near(change):
                self._waiting.append(Look(first, len(self._removed) - 1, before, value, False))
            return True
        self._estimated.update(edges)
        return self._audit(first, before, values)

    def _audit(self, first: int, before: float, values: dict[Place, float]) -> bool:
        """Hold edges that just went and were drawn against their tests; go back to the first that was wrong.

        Returns:
            Whether all went rightly.
        """
        gone = len(self._removed) - (self._position - first)
        for place in range(first, self._position):
            writer = self._edges[place]
            if writer not in self._drawn:
                continue
            cur = before if place == first else values[Place(place)]
            new = self._cur if place + 1 == self._position else values[Place(place + 1)]
            self._audited.add(writer)
            look = Look(place, gone + place - first, cur, new, False)
            if self._config.stays(new - cur):
                self._scores[writer] = new - cur
                self._waiting = [other for other in self._waiting if other.position < place]
                self._return_to(look)
                if self._is_near(new - cur):
                    self._waiting.append(replace(look, stays=True))
                return False
            if self._is_near(new - cur):
                self._waiting.append(look)
        return True

    def _return_to(self, look: Look) -> None:
        super()._return_to(look)
        writer = self._edges[look.position]
        for decided in (self._estimated, self._audited, self._wrong):
            decided.intersection_update(self._scores)
        self._estimated.discard(writer)
        if look.stays:  # a second look finds that it goes, as was estimated: now a test says so
            self._audited.discard(writer)
            self._wrong.discard(writer)
        elif writer in self._audited:
            self._wrong.add(writer)
        self._ahead = None
