"""The way on which a reader's edges are expected to go, and what slopes along it say of their scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1e-300  # divides where a threshold, or what edges carry, is 0

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class IntervalRule:
    """When estimates decide: chosen by measurement (docs/verified-estimates.md).

    Attributes:
        margin: m; an edge is tested if it may score (1 - m) tau or more.
        wary: The margin of an edge that carries `weighty` of what all edges of the reader carry, squared: so
            large a step may bend the way, and its own slope with it.
        weighty: See there.
        residual: r; estimates may miss what the metric moved by, in all, by r tau.
        bend: Slopes may move by so many tau, all together, between two circuits whose metric is measured:
            what moves more may hide errors that cancel.
        turn: And by so many between two circuits at which slopes are measured.
        heavy: Of edges that carry so much of what an interval carries, squared, and whose own slope moves by
            `stir` tau or more anywhere on the way, there is one between two measured circuits where slopes
            move; of those that carry `all_but` so much, in any case there.
        stir: See there.
        all_but: See there.
        apart: The metric is measured at least so many times on the way through a reader.
        few: So many edges are tested one by one: they cost less than slopes.
        cut: Where estimates miss, the way between two measured circuits is cut into so many pieces.
        together: Circuits on the way that are measured at once.
        doubts: An edge whose estimate is so close to the threshold, in tau, may go another way than expected.
        far: Slopes ahead tell no longer where what was foretold missed by so many tau.
        rounds: How often slopes are measured at most before the way is taken.
    """

    margin: float = 0.5
    wary: float = 0.7
    weighty: float = 0.02
    residual: float = 0.25
    bend: float = 1.0
    turn: float = 3.0
    heavy: float = 0.05
    stir: float = 0.2
    all_but: float = 0.4
    apart: int = 4
    few: int = 6
    cut: int = 6
    together: int = 12
    doubts: float = 0.4
    far: float = 2.0
    rounds: int = 3


@dataclass(frozen=True)
class Estimates:
    """Scores of edges that are decided one after the other, from slopes at both ends.

    Attributes:
        start: Slopes where the first of them is decided. [edges]
        end: Slopes where all are. [edges]
        scores: Estimates. [edges]
        swings: What scores would be off by if slopes turned between the ends, and back, as they turn where
            they do most on the whole way. [edges]
    """

    start: Floats
    end: Floats
    scores: Floats
    swings: Floats

    @classmethod
    def between(cls, start: Floats, end: Floats, goes: Bools | None = None) -> Estimates:
        """Estimate scores.

        Slopes change by what went before. Where that is one direction (a curvature of rank one), the change
        of an edge's slope is to that of all as the edge's own share in it; else each edge takes an equal one.

        Args:
            start: Slopes where the first edge is decided. [edges]
            end: Slopes where all are. [edges]
            goes: Which edges go; all, if not given. [edges]
        """
        every = np.ones(len(start), dtype=bool) if goes is None else goes
        moved = end - start
        steps = np.where(every, moved, 0.0)
        total = float(steps.sum())
        if abs(total) > 0.5 * float(np.abs(steps).sum()):
            # An edge that stays is tested where it would go: half of its own step counts then, too.
            reached = (np.cumsum(steps) - np.where(every, moved / 2, -moved / 2)) / total
        else:
            reached = even(every)
        return cls(start, end, start + moved * reached, np.zeros(len(start)))

    @property
    def highest(self) -> Floats:
        """The largest score each edge may have. [edges]"""
        found = np.maximum(self.scores, np.maximum(self.start, self.end))
        return np.maximum(found, self.scores + self.swings)

    @property
    def furthest(self) -> Floats:
        """The largest magnitude each score may have. [edges]"""
        found = np.maximum(np.abs(self.scores), np.maximum(np.abs(self.start), np.abs(self.end)))
        return np.maximum(found, np.abs(self.scores + self.swings))

    @property
    def moved(self) -> Floats:
        """By how much each slope moves. [edges]"""
        return np.abs(self.end - self.start)

    @property
    def restless(self) -> Floats:
        """By how much each slope moves, or would if it turned as elsewhere on the way. [edges]"""
        return np.maximum(self.moved, np.abs(self.swings))

    def adding_up(self, some: slice, change: float) -> Floats:
        """Some estimates, corrected to add up to what the metric moved by, most where slopes moved most."""
        scores = self.scores[some]
        weight = self.moved[some]
        total = float(weight.sum())
        share = weight / total if total > 0 else np.full(len(scores), 1 / max(1, len(scores)))
        corrected: Floats = scores + (change - float(scores.sum())) * share
        return corrected


@dataclass(frozen=True)
class Turn:
    """How slopes turned between two circuits, read as a curvature of rank one, h hᵀ or -h hᵀ.

    Edges that went moved the slope of edge i by (h·d_i)(h·D), d_i what it carries and D the sum over those
    that went, whose own slopes moved by (h·D)² all together.

    Attributes:
        sign: Of the curvature.
        steps: h·d of each edge. [edges]
    """

    sign: float
    steps: Floats

    @classmethod
    def between(cls, moved: Floats, went: Bools) -> Turn:
        """Read it from what slopes moved by.

        Args:
            moved: By how much, NaN where that is not known. [edges]
            went: The edges that went. [edges]
        """
        known = np.nan_to_num(moved)
        total, whole = float(known[went].sum()), float(np.abs(known[went]).sum())
        # Where slopes have no common direction the sum says too little of how far edges went.
        far = max(abs(total), whole / 2, _SMALLEST)
        return cls(-1.0 if total < 0 else 1.0, known / np.sqrt(far))

    def swings(self, some: slice, goes: Bools) -> Floats:
        """What estimates of edges would miss if slopes turned so among them.

        Args:
            some: The edges.
            goes: Which of them go. [some]
        """
        own = self.steps[some]
        gone = np.where(goes, own, 0.0)
        before = np.cumsum(gone) - gone
        found: Floats = self.sign * own * (before + own / 2 - even(goes) * float(gone.sum()))
        return found


@dataclass(frozen=True)
class Point:
    """A circuit on the way at which slopes were measured.

    Attributes:
        position: The reader's edges before it are decided there.
        slopes: Of the reader's edges; NaN where they were decided before. [edges]
    """

    position: int
    slopes: Floats


@dataclass(frozen=True)
class Stop:
    """A place on the way where the metric is measured.

    Attributes:
        place: The reader's edges before it are decided there.
        is_test: Whether the next edge is tested there.
    """

    place: int
    is_test: bool


@dataclass(frozen=True)
class Way:
    """How a reader's next edges are expected to be decided.

    Attributes:
        points: Circuits at which slopes were measured, ascending; none while it is not known.
        stays: Edges expected to stay, of all of the reader's. [edges]
    """

    points: tuple[Point, ...]
    stays: Bools

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.points[-1].position

    def _intervals(self) -> Iterator[tuple[slice, Estimates]]:
        for one, two in pairwise(self.points):
            inside = slice(one.position, two.position)
            yield inside, Estimates.between(one.slopes[inside], two.slopes[inside], ~self.stays[inside])

    def _turns(self) -> Iterator[Turn]:
        for one, two in pairwise(self.points):
            went = ~self.stays
            went[: one.position] = went[two.position :] = False
            yield Turn.between(two.slopes - one.slopes, went)

    def estimates(self) -> Estimates:
        """Of all edges of the reader; NaN for those that are not on the way. [edges]"""
        return self._estimates

    @cached_property
    def _estimates(self) -> Estimates:
        start, end, scores, swings = (np.full(len(self.stays), np.nan) for _ in range(4))
        turns = list(self._turns())
        for inside, own in self._intervals():
            start[inside], end[inside], scores[inside] = own.start, own.end, own.scores
            each = np.array([turn.swings(inside, ~self.stays[inside]) for turn in turns])
            largest = np.abs(each).argmax(axis=0)
            swings[inside] = np.take_along_axis(each, largest[None], axis=0)[0]
        return Estimates(start, end, scores, swings)

    def heavy(self, sizes: Floats, rule: IntervalRule, threshold: float) -> Bools:
        """Edges that bend the way by themselves. [edges]

        Args:
            sizes: How much each edge carries. [edges]
            rule: What is heavy.
            threshold: Where slopes move by less, all together, nothing bends.
        """
        found = np.zeros(len(self.stays), dtype=bool)
        # A slope may come back to where it was: it is stirred all the same.
        stirred = np.ptp([point.slopes for point in self.points], axis=0) >= rule.stir * threshold
        for inside, own in self._intervals():
            if float(own.moved.sum()) > rule.bend * threshold:
                share = shares(sizes[inside])
                found[inside] = (share >= rule.all_but) | (stirred[inside] & (share >= rule.heavy))
        return found

    def gaps(self, rule: IntervalRule, threshold: float) -> list[int]:
        """Where slopes should be measured too, because they move far between two points."""
        found: list[int] = []
        for inside, own in self._intervals():
            steps = np.where(self.stays[inside], 0.0, own.moved)
            total = np.cumsum(np.nan_to_num(steps))
            turns = np.ceil(total[-1] / max(rule.turn * threshold, _SMALLEST))
            pieces = int(min(turns, len(steps) // rule.few, 4))
            places = (np.searchsorted(total, total[-1] * k / pieces) + 1 for k in range(1, pieces))
            inner = {int(place) for place in places} - {0, len(steps)}
            found += [inside.start + place for place in sorted(inner)]
        return found

    def stops(
        self,
        first: int,
        tested: Bools,
        alone: Bools,
        measured: Bools,
        rule: IntervalRule,
        threshold: float,
    ) -> list[Stop]:
        """Where the metric is measured from some position on, the way's end included.

        Args:
            first: The position.
            tested: Edges that are tested. [edges]
            alone: Edges of which there is one between two measured circuits at most. [edges]
            measured: Edges before which it is measured in any case. [edges]
            rule: How far apart measured circuits are.
            threshold: tau.
        """
        moved = np.nan_to_num(self.estimates().restless)
        apart = max(rule.few, -(-len(self.stays) // rule.apart))
        found, total, last, lone = [], 0.0, first, False
        for place in range(first, self.end):
            if tested[place]:
                found.append(Stop(place, True))
                total, last, lone = 0.0, place + 1, False
                continue
            total += float(moved[place])
            lone |= bool(alone[place])
            following = place + 1
            if following == self.end or tested[following]:
                continue
            far = total > rule.bend * threshold or following - last >= apart
            if far or measured[following] or (lone and alone[following]):
                found.append(Stop(following, False))
                total, last, lone = 0.0, following, False
        if last < self.end:
            found.append(Stop(self.end, False))
        return found


def even(goes: Bools) -> Floats:
    """The share of what goes that has gone when each edge is decided, half of itself included. [edges]"""
    found: Floats = (np.cumsum(goes) - 0.5 * goes) / max(1, int(goes.sum()))
    return found


def shares(sizes: Floats) -> Floats:
    """What each of some edges carries of what all carry, squared. [edges]"""
    squares = sizes**2
    found: Floats = squares / max(float(squares.sum()), _SMALLEST)
    return found


def spread(first: int, last: int, count: int) -> list[int]:
    """So many positions between two, evenly, the last included."""
    return sorted({first + (last - first) * k // count for k in range(1, count + 1)} - {first})
