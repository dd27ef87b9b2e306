"""ACDC with a budget: how far its removals may carry the metric in all (docs/searches.md).

ACDC's criterion bounds what each removal costs, not what they cost together. Here an edge goes only if its
score is below tau, and the circuit without it is no further from the full model than its share of the way:
when k of N edges are decided, the next may go if

    |m(circuit without it) - m(full)| <= max_gap * |m(empty) - m(full)| * (k + 1) / N

so that the circuit at the end is within the whole bound. All else is ACDC's: order, batches, second looks.

Where tests of a reader are not of one precision with the metric of finished circuits, the reader's circuit is
measured again once its edges are decided, and edges come back if it is beyond its share: by FP32 in regime
`pahq`, by the model with nothing raised in `pahq-literal`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.config import Regime
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.setting import Setting
from pahq_hf.search.acdc_run import compare, found_by, searched, with_margin
from pahq_hf.search.budget_options import BudgetOptions
from pahq_hf.search.kind import Found
from pahq_hf.search.reader_search import Deciding, Look, ReaderSearch
from pahq_hf.search.reference import Reference
from pahq_hf.search.replay import replay
from pahq_hf.search.state import ReaderRecord, Search
from pahq_hf.search.work import Work

_ROUNDING = 1e-9  # of sums of metrics in double precision


@dataclass(frozen=True)
class Bound:
    """How far the metric may be from the full model's.

    Attributes:
        full: The metric of the full model, by the search's engine.
        empty: The metric of no edges.
        max_gap: The bound at the end, as a share of the gap between these two.
        edges: Edges that can be tested.
    """

    full: float
    empty: float
    max_gap: float
    edges: int

    @property
    def total(self) -> float:
        """The bound at the end."""
        return math.inf if self.max_gap == math.inf else self.max_gap * self.gap(self.empty)

    def gap(self, metric: float) -> float:
        """How far a metric is from the full model's."""
        return abs(metric - self.full)

    def allowed(self, decided: int) -> float:
        """The largest gap once so many edges are decided."""
        return self.total * (decided / self.edges)

    def step(self) -> dict[str, Any]:
        """What the journal keeps of it."""
        return {"full": self.full, "empty": self.empty}


class BudgetSearch(ReaderSearch):
    """Decides the edges of one reader within a bound.

    Args:
        work: What it is given.
        bound: The bound.
        decided: Edges decided before.
        offset: What the metric of a test lacks to that of a circuit.
        measure: The metric of a circuit that lacks exactly these edges into the reader, where tests are of
            another precision.
    """

    def __init__(
        self,
        work: Deciding,
        bound: Bound,
        decided: int,
        offset: float = 0.0,
        measure: Callable[[Sequence[int]], float] | None = None,
    ) -> None:
        super().__init__(work)
        self._bound = bound
        self._decided = decided
        self._offset = offset
        self._measure = measure
        self._before: list[float] = []  # the metric before each removed edge went

    def _stays(self, score: float, new: float, position: int) -> bool:
        return super()._stays(score, new, position) or not self._gap(new) <= self._allowed(position)

    def _gap(self, metric: float) -> float:
        return self._bound.gap(metric + self._offset)

    def _allowed(self, position: int) -> float:
        """The largest gap once the edge at a position is decided."""
        return self._bound.allowed(self._decided + position + 1)

    def _is_doubtful(self, score: float, new: float) -> bool:
        margin = self._config.margin or 0.0
        if margin in (0.0, math.inf):
            return margin > 0
        if math.isfinite(self._config.threshold):
            if super()._is_doubtful(score, new):
                return True
            if self._config.stays(score):
                return False
        # Errors are relative to how far the reader's tests have come from where the metric was exact.
        moved = abs(new - self._cur) + sum(self._moves[writer] for writer in self._removed)
        return abs(self._gap(new) - self._allowed(self._position)) <= margin * moved

    def _decide(self, writer: int, new: float) -> bool:
        before = self._cur
        stays = super()._decide(writer, new)
        if not stays:
            self._before.append(before)
        return stays

    def _return_to(self, look: Look) -> None:
        super()._return_to(look)
        self._before = [*self._before[: look.removed], *([look.cur] if look.stays else [])]

    def _is_done(self) -> bool:
        """Put edges back, the last one first, until the circuit is within its share by its own measure."""
        if self._measure is None or not self._removed:
            return True
        allowed, short = self._bound.allowed(self._decided + len(self._edges)), False
        while self._removed and not self._bound.gap(self._measure(self._removed)) <= allowed:
            self._kept.append(self._removed.pop())
            self._cur = self._before.pop()
            short = True
        if short:
            self._engine.cut(self._reader, self._removed)
        return True


def budget(work: Work[BudgetOptions]) -> Found:
    """Run the search to its end.

    The first step that it keeps says what the bound is a share of; the others are ACDC's.

    Args:
        work: The search.

    Returns:
        What it found.

    Raises:
        RunError: If what an interrupted run kept is damaged, or a step cannot be written.
    """
    options, graph, engine = work.options, work.graph, work.engine
    if work.steps:
        bound = _kept_bound(work)
    else:
        full, empty = engine.metric_of(graph.all_edges), work.units.empty_metric(engine)
        bound = Bound(full, empty, options.max_gap, _testable(graph, options))
        work.keep(bound.step())
    regime = work.setting.precision.regime
    reference = _reference(work, bound)
    done = _replayed(work, bound, reference).records
    name = f"budget, gap up to {options.max_gap:g}"
    state = searched(
        work,
        name,
        done,
        decider=lambda deciding, before: of_reader(deciding, before, bound, regime),
        reference=reference,
    )
    facts = {
        "full": bound.full,
        "empty": bound.empty,
        "kept_below_tau": _kept_below_tau(state, options),
        "bound": bound.total if math.isfinite(bound.total) else "inf",  # as options are written
    }
    label = name if options.threshold == math.inf else f"{name}, tau {options.threshold:g}"
    return replace(found_by(work, state, done, {"budget": facts}), label=label)


def resolve(options: BudgetOptions, setting: Setting) -> BudgetOptions:
    """The options with the margin of the regime, checked.

    Raises:
        ConfigError: If no reader matches, or there is a margin where there is no second look.
    """
    setting.graph.match_readers(options.readers)
    return with_margin(options, setting.precision)


def check(work: Work[BudgetOptions], found: Found) -> None:
    """Check that a circuit is what a finished search found; of an unfinished one nothing can be said.

    Args:
        work: The search, which only reads.
        found: The circuit.

    Raises:
        RunError: If it is not, or if the journal is damaged.
    """
    if work.steps:
        bound = _kept_bound(work)
        compare(work, found, _replayed(work, bound, _reference(work, bound)))


def of_reader(work: Deciding, before: Search, bound: Bound, regime: Regime) -> BudgetSearch:
    """What decides the edges of a reader, given how the regime measures circuits."""
    engine, reader = work.engine, work.reader
    decided = _decided(before)
    if regime == "pahq":
        return BudgetSearch(
            work, bound, decided, measure=lambda gone: engine.look_again(reader, [gone]).values[0]
        )
    if regime == "pahq-literal":  # tests have the reader's node in FP32, circuits have none
        seen = work.reference
        offset = engine.metric_of(before.kept) - work.cur if seen is None else bound.full - seen
        return BudgetSearch(work, bound, decided, offset, lambda gone: _metric(engine, before, reader, gone))
    return BudgetSearch(work, bound, decided)


def _metric(engine: Engine, before: Search, reader: int, gone: Sequence[int]) -> float:
    kept: BoolArray = before.kept.copy()
    kept[reader, list(gone)] = False
    return engine.metric_of(kept)


def _testable(graph: Graph, options: BudgetOptions) -> int:
    return int(graph.all_edges[graph.match_readers(options.readers)].sum())


def _decided(state: Search) -> int:
    """Edges decided so far; those of a reader that nothing reads any more are too."""
    return sum(int(state.graph.all_edges[record.reader].sum()) for record in state.records if record.searched)


def _kept_below_tau(state: Search, options: BudgetOptions) -> int:
    """Edges that stay although their score is below tau: the budget did not reach for them."""
    return sum(
        not options.stays(record.scores[w])
        for record in state.records
        for w in record.kept
        if w in record.scores
    )


# -- the journal --------------------------------------------------------------------------------------


def _kept_bound(work: Work[BudgetOptions]) -> Bound:
    """The bound of an interrupted run.

    Raises:
        RunError: If its step is none.
    """
    step = work.steps[0]
    full, empty = step.get("full"), step.get("empty")
    if not (type(full) is float and type(empty) is float and math.isfinite(full) and math.isfinite(empty)):
        raise work.damaged(1, ": it does not have the metric of all edges and of none")
    return Bound(full, empty, work.options.max_gap, _testable(work.graph, work.options))


def _reference(work: Work[BudgetOptions], bound: Bound) -> Reference | None:
    return Reference.of(work, bound.full) if work.options.decides_by == "gap" else None


def _replayed(work: Work[BudgetOptions], bound: Bound, reference: Reference | None) -> Search:
    exact = work.setting.precision.regime == "fp32"
    return replay(
        work,
        None,
        first=1,
        mistake=lambda record, before: _mistake(record, before, work.options, bound, exact),
        reference=reference,
    )


def _mistake(
    record: ReaderRecord, before: Search, options: BudgetOptions, bound: Bound, exact: bool
) -> str | None:
    """What is wrong with a reader's decisions; None if nothing.

    Args:
        record: The reader.
        before: The search before it.
        options: The search.
        bound: The bound.
        exact: Whether scores tell the metric at every step.
    """
    gone = [writer for writer in record.scores if writer not in record.kept]
    if any(options.stays(record.scores[writer]) for writer in gone):
        return f"it removes edges whose scores reach the threshold {options.threshold:g}"
    if not exact:
        return None
    cur, decided = before.metric if before.records else bound.full, _decided(before)
    by_gap = options.decides_by == "gap"  # then scores tell how gaps grow
    at = bound.gap(cur) if by_gap else cur
    for writer in before.graph.in_edges(record.reader) if record.scores else ():
        decided += 1
        score = record.scores[writer]
        over = (at + score if by_gap else bound.gap(at + score)) - bound.allowed(decided)
        rounding = _ROUNDING * max(1.0, abs(cur), abs(bound.full))
        if writer in record.kept:
            if not options.stays(score) and over < -rounding:
                return "it keeps an edge that the budget lets go"
            continue
        if over > rounding:
            return "it removes an edge that the budget does not allow"
        at += score
    return None
