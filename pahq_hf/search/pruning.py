"""A circuit that loses its least edges, and swaps edges, each decision by exact tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.engine.protocol import Engine
from pahq_hf.search.attribution.methods import Scores
from pahq_hf.search.rounds import GAIN, Edge, Round, Scale, changed, least_first

_SHARE = 0.15  # of a circuit's edges that may go in a round
_TESTED = 2.5  # times as many edges are tested as may go
_FEW = 16  # edges that are tested, at least
_SLACK = 0.5  # of the gap without its worst edge, by which a round may be worse than that
_MOST_SLACK = 0.02  # of the gap between the full model and no edges: never more than so much
_CANDIDATES = 64  # edges whose return is tested, at least; a quarter of the circuit if that is more
_SWAPPED = 0.1  # of a circuit's edges that may be swapped at once
_TRIES = 16  # single swaps that are tried before it ends


class Pruned:
    """A circuit on its way to a size.

    Slopes at the circuit say which edges are promising; what goes or comes back was tested.

    Args:
        engine: Computes metrics.
        scale: What they are held against.
        start: The circuit that it starts from. [readers, writers]
        metric: Of that circuit.
        estimate: What removing each edge adds to the metric of a circuit, to first order, and what removing
            it once more would where it is gone. [readers, writers]

    Attributes:
        kept: The present circuit. [readers, writers]
        metric: Its metric.
    """

    def __init__(
        self,
        engine: Engine,
        scale: Scale,
        start: BoolArray,
        metric: float,
        estimate: Callable[[BoolArray], Scores],
    ) -> None:
        self._engine = engine
        self._graph: Graph = engine.graph
        self._scale = scale
        self._gap = scale.gap
        self._estimate = estimate
        self._drops: Scores | None = None  # estimates, at the present circuit
        self._tested = self._graph.no_edges()  # its edges whose effects are known
        self._effects = np.zeros(self._tested.shape)
        self._returning: list[tuple[Edge, float]] | None = None
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
        while (better := self._better(edges)) is not None:
            yield self._taken(better)
        while (idle := self._idle()) is not None:
            yield self._taken(idle)

    def within(self, gap: float) -> Iterator[Round]:
        """Remove edges round by round as long as the gap stays within a bound, and swap where none can go."""
        while (
            taken := self._shrinking(gap, self._some) or self._shrinking(gap, None) or self._better(self.size)
        ) is not None:
            yield self._taken(taken)

    def _taken(self, taken: Round) -> Round:
        self.kept = changed(self.kept, taken.removed, taken.added)
        self.metric = taken.metric
        self._drops = self._returning = None
        self._tested[:] = False
        return taken

    # -- what edges are worth -------------------------------------------------------------------------

    @property
    def _some(self) -> int:
        """How many edges are tested before all are."""
        return max(_FEW, int(_TESTED * _SHARE * self.size))

    def effects(self) -> Scores:
        """What removing each edge of the circuit alone adds to the metric. [readers, writers]"""
        self._test(edge_list(self.kept))
        return self._effects

    def _test(self, edges: Sequence[Edge]) -> None:
        """Test edges of the circuit that are not tested yet."""
        missing = self._graph.no_edges()
        for edge in edges:
            missing[edge] = not self._tested[edge]
        if missing.any():
            self._effects = np.where(missing, self._engine.drop_each(self.kept, missing), self._effects)
            self._tested |= missing

    def _estimates(self) -> Scores:
        if self._drops is None:
            self._drops = np.nan_to_num(self._estimate(self.kept), nan=np.inf)
        return self._drops

    def _least(self, most: int | None) -> list[Edge]:
        """The circuit's edges whose removal alone moves the metric least, the least first.

        Args:
            most: Only so many are tested, those that promise most; None for all.
        """
        return self._ranked(np.abs, most)

    def _nearest(self, most: int | None) -> list[Edge]:
        """The same by how near removal alone brings the metric to the full model's, the nearest first."""
        return self._ranked(lambda effects: abs(self.metric + effects - self._scale.full), most)

    def _ranked(self, key: Callable[[Scores], Scores], most: int | None) -> list[Edge]:
        edges = edge_list(self.kept)
        if most is not None and most < len(edges):
            promise = key(self._estimates())
            edges = sorted(edges, key=lambda edge: float(promise[edge]))[:most]
        self._test(edges)
        rank = key(self._effects)
        return sorted(edges, key=lambda edge: (float(rank[edge]), edge))

    # -- removing -------------------------------------------------------------------------------------

    def _removal(self, edges: int) -> Round:
        """The most of the least edges that may go at once, and leave so many."""
        size = max(1, min(self.size - edges, int(_SHARE * self.size)))
        ranked = self._least(max(_FEW, int(_TESTED * size)))

        def may(size: int, metric: float) -> bool:
            worst = max(self.gap, *(self._gap(self.metric + self._effects[edge]) for edge in ranked[:size]))
            slack = max(GAIN * self._scale.whole, _SLACK * worst)  # of all edges, worst is next to none
            return size == 1 or self._gap(metric) <= worst + min(slack, _MOST_SLACK * self._scale.whole)

        taken = self._most(ranked, size, may)
        assert taken is not None  # one may always go
        place = {edge: number for number, edge in enumerate(ranked)}  # others are dead without those
        return replace(
            taken, removed=tuple(sorted(taken.removed, key=lambda edge: place.get(edge, len(place))))
        )

    def _shrinking(self, gap: float, most: int | None) -> Round | None:
        """The most edges that may go at once within a bound, the best to go first; None if none may.

        Args:
            gap: The bound.
            most: Only so many are tested; None for all.
        """
        together = max(1, int(_SHARE * self.size))
        return self._most(self._nearest(most), together, lambda _, metric: self._gap(metric) <= gap)

    def _most(self, ranked: Sequence[Edge], size: int, may: Callable[[int, float], bool]) -> Round | None:
        """The most of the first edges that may go at once, and what is dead then; None if not even one may.

        Args:
            ranked: The edges, the first to go first.
            size: At most so many; then half of them, and so on.
            may: Whether so many may, as they leave this metric.
        """
        size = min(len(ranked), size)
        while size:
            without, metric = self._without(self.kept, ranked[:size])
            if may(size, metric):
                return Round(tuple(edge_list(self.kept & ~without)), (), metric)
            size //= 2
        return None

    def _without(self, kept: BoolArray, removed: Sequence[Edge]) -> tuple[BoolArray, float]:
        """A circuit without some edges and those that are dead then, and its metric."""
        without = self._graph.live_edges(changed(kept, removed, ()))
        return without, self._engine.metric_of(without)

    def _relief(self, most: int | None) -> Round | None:
        """The edges without which the metric is nearest, if it is nearer than with them.

        Args:
            most: Only so many are tested; None for all.
        """
        nearer = [e for e in self._nearest(most) if self._is_nearer(self.metric + self._effects[e])]

        def may(size: int, metric: float) -> bool:
            best = self._gap(self.metric + self._effects[nearer[0]])
            return self._is_nearer(metric) and (size == 1 or self._gap(metric) <= best)

        return self._most(nearer, max(1, int(_SHARE * self.size)), may)

    def _idle(self) -> Round | None:
        """The most of the edges that do nothing, without which all is as it was; None if there are none."""
        nothing = self._scale.nothing
        ranked = [edge for edge in self._least(None) if abs(self._effects[edge]) <= nothing]
        # Of edges that stand in for each other, each alone does nothing.
        return self._most(ranked, len(ranked), lambda _, metric: abs(metric - self.metric) <= nothing)

    def _is_nearer(self, metric: float) -> bool:
        return bool(self._gap(metric) < self.gap - self._scale.gain(self.gap))

    # -- swapping -------------------------------------------------------------------------------------

    def _better(self, edges: int) -> Round | None:
        """A change that brings the metric nearer, with at most so many edges; None if there is none.

        What would go is first chosen among edges that promise to be the least, then among all, and only where
        that helps nothing is every edge tested again beside those that came back.
        """
        return (
            self._relief(self._some)
            or self._swap(edges, lambda whole, over: self._least(max(_FEW, 2 * over)))
            or self._relief(None)
            or self._swap(edges, lambda whole, over: self._least(None))
            or self._swap(edges, lambda whole, over: least_first(whole, self._engine.drop_each(whole)))
        )

    def _swap(self, edges: int, going: Callable[[BoolArray, int], Sequence[Edge]]) -> Round | None:
        """The best of the edges that may come back for others; None if not even one may.

        Args:
            edges: How many there may be.
            going: Which edges are the first to go from a circuit that has so many too many.
        """
        back = self._back()
        better = [edge for edge, gain in back if gain > 0]
        size = min(len(better), max(1, int(_SWAPPED * edges)))
        several = [better[: size >> k] for k in range(size.bit_length() - 1)]
        swaps = [swap for added in several if (swap := self._swapped(added, edges, going))]
        if swaps:
            return min(swaps, key=lambda swap: self._gap(swap.metric))
        single = (self._swapped([edge], edges, going) for edge, _ in back[:_TRIES])
        return next(filter(None, single), None)

    def _swapped(
        self, added: Sequence[Edge], edges: int, going: Callable[[BoolArray, int], Sequence[Edge]]
    ) -> Round | None:
        """Let some edges come back and others go for them; None if that brings the metric no nearer."""
        whole = changed(self.kept, (), added)
        over = int(whole.sum()) - edges
        if over > 0:
            whole, metric = self._without(whole, going(whole, over)[:over])
        else:
            metric = self._engine.metric_of(whole)
        removed, back = edge_list(self.kept & ~whole), edge_list(whole & ~self.kept)
        if not back or not self._is_nearer(metric):
            return None
        return Round(tuple(removed), tuple(back), metric)

    def _back(self) -> list[tuple[Edge, float]]:
        """Edges that may come back, and how much nearer each alone brings the metric, the best first.

        Those are tested of which estimates at the circuit promise most.
        """
        if self._returning is None:
            absent = self._graph.addable_edges(self.kept)
            gaps = abs(self.metric - self._estimates() - self._scale.full)
            promise = np.where(absent, self.gap - gaps, -np.inf)
            count = max(_CANDIDATES, self.size // 4)
            chosen = self._graph.no_edges()
            chosen.flat[np.argsort(-promise, axis=None, kind="stable")[:count]] = True
            candidates = chosen & np.isfinite(promise)
            found = self._engine.add_each(self.kept, candidates)
            gains = [
                (edge, self.gap - self._gap(self.metric + found[edge])) for edge in edge_list(candidates)
            ]
            self._returning = sorted(gains, key=lambda pair: -pair[1])
        return self._returning
