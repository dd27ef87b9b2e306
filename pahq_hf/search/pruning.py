"""A circuit that loses its least edges, and swaps edges, each decision by exact tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.engine.protocol import Engine
from pahq_hf.search.attribution.methods import Scores

Edge = tuple[int, int]

_SHARE = 0.15  # of a circuit's edges that may go in a round
_SLACK = 0.02  # of the gap between the full model and no edges, by which a round may be worse than its worst
_CANDIDATES = (
    64  # edges whose return is tested in a round, at least; a quarter of the circuit if that is more
)
_SWAPPED = 0.1  # of a circuit's edges that may be swapped at once
_TRIES = 16  # single swaps that are tried before it ends
GAIN = 1e-4  # of the gap between the full model and no edges, that a swap has to bring
NOTHING = 1e-6  # of it, by which the metric moves where an edge does nothing: rounding


@dataclass(frozen=True)
class Scale:
    """What metrics of circuits are held against.

    Attributes:
        full: The metric of all edges.
        empty: The metric of none.
    """

    full: float
    empty: float

    @classmethod
    def of(cls, engine: Engine) -> Scale:
        """The scale of an engine's prompts."""
        graph = engine.graph
        return cls(engine.metric_of(graph.all_edges.copy()), engine.metric_of(graph.no_edges()))

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Scale:
        """Read what `asdict` made.

        Raises:
            TypeError: If a value is no number; or KeyError.
        """
        return cls(as_float(facts["full"]), as_float(facts["empty"]))

    @property
    def whole(self) -> float:
        """The gap of no edges."""
        return self.gap(self.empty)

    @property
    def nothing(self) -> float:
        """By how much the metric moves where an edge does nothing."""
        return NOTHING * self.whole

    def gap(self, metric: float) -> float:
        """How far a metric is from that of all edges."""
        return abs(metric - self.full)


@dataclass(frozen=True)
class Round:
    """What changes at once.

    Attributes:
        removed: Edges that go, the least first.
        added: Edges that come back.
        metric: Of the circuit then.
        validation: The same on the pairs that judge; None if there are none, or it is not measured yet.
        is_back: Whether it goes to the best circuit before, without what does nothing there: it is the last
            one, and its circuit is kept.
    """

    removed: tuple[Edge, ...]
    added: tuple[Edge, ...]
    metric: float
    validation: float | None = None
    is_back: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a step of a journal."""
        found: dict[str, Any] = {"removed": [list(edge) for edge in self.removed], "metric": self.metric}
        if self.added:
            found["added"] = [list(edge) for edge in self.added]
        if self.is_back:
            found["back"] = True
        return found if self.validation is None else found | {"validation": self.validation}

    @classmethod
    def read(cls, step: Mapping[str, Any]) -> Round:
        """Read what `to_json` made.

        Raises:
            ValueError: If a value is missing or of another type; or TypeError or KeyError.
        """
        removed, added, judged = step["removed"], step.get("added", []), step.get("validation")
        is_back = step.get("back", False)
        if type(is_back) is not bool or any(
            type(index) is not int for e in (*removed, *added) for index in e
        ):
            raise TypeError("a value is of another type")
        return cls(
            tuple((r, w) for r, w in removed),
            tuple((r, w) for r, w in added),
            as_float(step["metric"]),
            None if judged is None else as_float(judged),
            is_back,
        )

    @classmethod
    def back(cls, last: BoolArray, kept: BoolArray, metric: float, validation: float | None) -> Round:
        """The round from the last circuit to another, which was measured. [readers, writers]"""
        removed, added = (tuple(edge_list(one & ~other)) for one, other in ((last, kept), (kept, last)))
        return cls(removed, added, metric, validation, is_back=True)


class Pruned:
    """A circuit on its way to a size.

    Args:
        engine: Computes metrics.
        scale: What they are held against.
        start: The circuit that it starts from. [readers, writers]
        metric: Of that circuit.

    Attributes:
        kept: The present circuit. [readers, writers]
        metric: Its metric.
    """

    def __init__(self, engine: Engine, scale: Scale, start: BoolArray, metric: float) -> None:
        self._engine = engine
        self._graph: Graph = engine.graph
        self._scale = scale
        self._gap = scale.gap
        self._effects: Scores | None = None  # of the present circuit's edges
        self.kept = start
        self.metric = metric

    @property
    def gap(self) -> float:
        """How far the metric is from the full model's."""
        return self._gap(self.metric)

    @property
    def size(self) -> int:
        """How many edges it has."""
        return int(self.kept.sum())

    def to_size(self, edges: int) -> Iterator[Round]:
        """Remove edges round by round until there are no more than so many."""
        while self.size > edges:
            yield self._taken(self._removal(edges))

    def at_size(self, edges: int) -> Iterator[Round]:
        """Swap edges round by round, with at most so many, until no swap helps; what does nothing goes."""
        while (better := self._relief() or self._swap(edges)) is not None:
            yield self._taken(better)
        while (idle := self._idle()) is not None:
            yield self._taken(idle)

    def within(self, gap: float) -> Iterator[Round]:
        """Remove edges round by round as long as the gap stays within a bound, and swap where none can go."""
        while (taken := self._shrinking(gap) or self._relief() or self._swap(self.size)) is not None:
            yield self._taken(taken)

    def _taken(self, taken: Round) -> Round:
        self.kept = changed(self.kept, taken.removed, taken.added)
        self.metric = taken.metric
        self._effects = None
        return taken

    def effects(self) -> Scores:
        """What removing each edge of the circuit alone adds to the metric. [readers, writers]"""
        if self._effects is None:
            self._effects = self._engine.drop_each(self.kept)
        return self._effects

    # -- removing -------------------------------------------------------------------------------------

    def _removal(self, edges: int) -> Round:
        """The most of the least edges that may go at once, and leave so many."""
        effects = self.effects()
        ranked = least_first(self.kept, effects)
        size = max(1, min(len(ranked) - edges, int(_SHARE * len(ranked))))
        while True:
            without, metric = self._without(self.kept, ranked[:size])
            worst = max(self._gap(self.metric + effects[edge]) for edge in ranked[:size])
            if size == 1 or self._gap(metric) <= max(self.gap, worst) + _SLACK * self._scale.whole:
                return Round(tuple(edge for edge in ranked if not without[edge]), (), metric)
            size //= 2

    def _shrinking(self, gap: float) -> Round | None:
        """The most edges that may go at once within a bound, the best to go first; None if none may."""
        effects = self.effects()
        ranked = sorted(edge_list(self.kept), key=lambda e: self._gap(self.metric + float(effects[e])))
        size = max(1, int(_SHARE * len(ranked))) if ranked else 0
        while size:
            without, metric = self._without(self.kept, ranked[:size])
            if self._gap(metric) <= gap:
                return Round(tuple(edge_list(self.kept & ~without)), (), metric)
            size //= 2
        return None

    def _without(self, kept: BoolArray, removed: Sequence[Edge]) -> tuple[BoolArray, float]:
        """A circuit without some edges and those that are dead then, and its metric."""
        without = self._graph.live_edges(changed(kept, removed, ()))
        return without, self._engine.metric_of(without)

    def _relief(self) -> Round | None:
        """The edge without which the metric is nearest, if it is nearer than with it."""
        effects = self.effects()
        edges = edge_list(self.kept)
        if not edges:
            return None
        removed = min(edges, key=lambda edge: self._gap(self.metric + float(effects[edge])))
        without, metric = self._without(self.kept, [removed])
        if not self._is_nearer(metric):
            return None
        return Round(tuple(edge_list(self.kept & ~without)), (), metric)

    def _idle(self) -> Round | None:
        """The most of the edges that do nothing, without which all is as it was; None if there are none."""
        effects, nothing = self.effects(), self._scale.nothing
        ranked = [edge for edge in least_first(self.kept, effects) if abs(effects[edge]) <= nothing]
        size = len(ranked)
        while size > 0:  # of edges that stand in for each other, each alone does nothing
            without, metric = self._without(self.kept, ranked[:size])
            if abs(metric - self.metric) <= nothing:
                return Round(tuple(edge_list(self.kept & ~without)), (), metric)
            size //= 2
        return None

    def _is_nearer(self, metric: float) -> bool:
        return self._gap(metric) < self.gap - GAIN * self._scale.whole

    # -- swapping -------------------------------------------------------------------------------------

    def _swap(self, edges: int) -> Round | None:
        """The best edges that may come back for the least; None if not even one may.

        What would go is first guessed by what each edge is worth in the present circuit, which is known; only
        where no guess is right is every edge tested again beside those that came back.
        """
        candidates = self._candidates()
        found = self._engine.add_each(self.kept, candidates)
        gains = {edge: self.gap - self._gap(self.metric + found[edge]) for edge in edge_list(candidates)}
        ranked = sorted(gains, key=lambda edge: -gains[edge])
        better = [edge for edge in ranked if gains[edge] > 0]
        size = min(len(better), max(1, int(_SWAPPED * edges)))
        several = [better[: size >> k] for k in range(size.bit_length() - 1)]
        single = [[edge] for edge in ranked[:_TRIES]]
        guessed = [swap for added in several if (swap := self._swapped(added, edges, self.effects()))]
        if guessed:
            return min(guessed, key=lambda swap: self._gap(swap.metric))
        tries = (self._swapped(added, edges, self.effects()) for added in single)
        retries = (self._swapped(added, edges, None) for added in (*several, *single))
        return next(filter(None, chain(tries, retries)), None)

    def _swapped(self, added: Sequence[Edge], edges: int, effects: Scores | None) -> Round | None:
        """Let some edges come back and the least go for them; None if that brings the metric no nearer.

        Args:
            added: The edges that come back.
            edges: How many there may be.
            effects: What removing each of the others adds to the metric; None to test each beside those that
                came back, of which the least may go again. [readers, writers]
        """
        whole = changed(self.kept, (), added)
        over = int(whole.sum()) - edges
        if over > 0:
            others = whole if effects is None else self.kept
            tested = self._engine.drop_each(whole) if effects is None else effects
            whole, metric = self._without(whole, least_first(others, tested)[:over])
        else:
            metric = self._engine.metric_of(whole)
        removed, back = edge_list(self.kept & ~whole), edge_list(whole & ~self.kept)
        if not back or not self._is_nearer(metric):
            return None
        return Round(tuple(removed), tuple(back), metric)

    def _candidates(self) -> BoolArray:
        """Edges that may do most good, by slopes at the circuit. [readers, writers]"""
        graph, engine = self._graph, self._engine
        absent = graph.addable_edges(self.kept)
        promise = np.full(absent.shape, -np.inf)
        engine.begin(self.kept)
        for reader in np.flatnonzero(absent.any(axis=1)).tolist():
            gone = [w for w in graph.in_edges(reader) if not self.kept[reader, w]]
            writers = np.flatnonzero(absent[reader]).tolist()
            effects = engine.slopes(reader, [gone], writers).effects[0]
            promise[reader, writers] = [self.gap - self._gap(self.metric - effect) for effect in effects]
        engine.finish()
        promise[np.isnan(promise)] = -np.inf
        count = max(_CANDIDATES, int(self.kept.sum()) // 4)
        chosen = graph.no_edges()
        order = np.argsort(-promise, axis=None, kind="stable")[:count]
        chosen.flat[order] = True
        hopeful: BoolArray = chosen & np.isfinite(promise)
        return hopeful


def changed(kept: BoolArray, removed: Sequence[Edge], added: Sequence[Edge]) -> BoolArray:
    """A circuit without some edges and with others. [readers, writers]"""
    other = kept.copy()
    for edge in removed:
        other[edge] = False
    for edge in added:
        other[edge] = True
    return other


def after(graph: Graph, kept: BoolArray, taken: Round) -> BoolArray:
    """A circuit after a round. [readers, writers]

    Raises:
        ValueError: If the round is none of this circuit's.
    """
    removed, added = taken.removed, taken.added
    rows, columns = graph.all_edges.shape
    inside = all(0 <= r < rows and 0 <= w < columns for r, w in (*removed, *added))
    edges = inside and all(graph.all_edges[edge] for edge in (*removed, *added))
    if not edges or not (removed or added) or len({*removed, *added}) < len(removed) + len(added):
        raise ValueError("it does not change edges of the graph")
    if not all(kept[edge] for edge in removed) or any(kept[edge] for edge in added):
        raise ValueError("it does not change edges of the circuit before it")
    return changed(kept, removed, added)


def least_first(kept: BoolArray, effects: Scores) -> list[Edge]:
    """A circuit's edges, those first whose removal alone moves the metric least."""
    readers, writers = np.nonzero(kept)
    order = np.argsort(np.abs(effects[readers, writers]), kind="stable")
    return [(int(readers[k]), int(writers[k])) for k in order]


def ranks(graph: Graph, scores: Scores, kept: BoolArray, worth: Scores, rounds: Sequence[Round]) -> Scores:
    """Where each edge ranks among all, from 1 for the best to nearly 0.

    Args:
        graph: The graph.
        scores: Rank edges that were never in the circuit. [readers, writers]
        kept: The circuit, whose edges come first. [readers, writers]
        worth: Of each of these. [readers, writers]
        rounds: What led to it: edges that went last come next.

    Returns:
        [readers, writers]
    """
    ranked = dict.fromkeys(sorted(edge_list(kept), key=lambda edge: -worth[edge]))
    for taken in reversed(rounds):
        ranked |= dict.fromkeys(edge for edge in reversed(taken.removed) if edge not in ranked)
    seen = changed(graph.no_edges(), (), list(ranked))
    readers, writers = np.nonzero(graph.all_edges & ~seen)
    others = np.argsort(-scores[readers, writers], kind="stable")
    ranked |= dict.fromkeys((int(readers[k]), int(writers[k])) for k in others)
    found = np.zeros(graph.all_edges.shape)
    for place, edge in enumerate(ranked):
        found[edge] = 1 - place / len(ranked)
    return found


def as_float(value: object) -> float:
    """A number of a journal's step.

    Raises:
        TypeError: If it is none.
    """
    if type(value) is not float:
        raise TypeError("a value is of another type")
    return value
