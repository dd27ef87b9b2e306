"""ACDC: the greedy search over edges (Conmy et al. 2023; semantics.md, section 3).

The search knows engines only by a small protocol and nothing of models. It asks for batches of
candidates: the k-th has the first k edges removed. As most edges go, most of a batch is accepted at
once; the first edge that stays ends the batch. Decisions are those of the sequential loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pahq_hf.config import ACDCConfig
from pahq_hf.graph import BoolArray, Graph


class Engine(Protocol):
    """Computes the metric of the current circuit with some edges of one reader removed."""

    graph: Graph
    evaluations: int

    def begin(self, kept: BoolArray) -> float:
        """Start from an edge set. Returns its metric."""

    def focus(self, reader: int) -> float | None:
        """Turn to a reader. Returns the metric measured again, if a weight's precision changed."""

    def try_removals(self, reader: int, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Metric of the current circuit without each candidate's edges into `reader`."""

    def remove(self, reader: int, writers: Sequence[int]) -> None:
        """Remove edges into `reader` for good."""

    def finish(self) -> None:
        """Release what `focus` took."""


@dataclass(frozen=True)
class ReaderRecord:
    """What was decided about one reader.

    Attributes:
        reader: Its index.
        searched: False when the reader was outside the search and keeps all its edges.
        kept: Writers kept, ascending.
        scores: `new - cur` of every tested edge by writer.
        metric: The metric after the last decision.
    """

    reader: int
    searched: bool
    kept: tuple[int, ...]
    scores: dict[int, float]
    metric: float


@dataclass
class Search:
    """State of a search: what is decided so far.

    Attributes:
        graph: The model's graph.
        kept: Edges not removed. [readers, writers]
        scores: `new - cur` when an edge was tested, else 0. [readers, writers]
        tested: Edges that were tested. [readers, writers]
        metric: Metric of the current circuit.
        metric_full: Metric of the full model.
        records: Finished readers in order.
    """

    graph: Graph
    kept: BoolArray
    scores: NDArray[np.float64]
    tested: BoolArray
    metric: float = 0.0
    metric_full: float = 0.0
    records: list[ReaderRecord] = field(default_factory=list)

    @classmethod
    def start(cls, graph: Graph) -> Search:
        """Nothing decided yet."""
        none = graph.no_edges()
        return cls(graph, graph.all_edges.copy(), np.zeros(none.shape), none)

    def apply(self, record: ReaderRecord) -> None:
        """Take over a finished reader's decisions."""
        reader = record.reader
        if record.searched:
            self.kept[reader] = False
            self.kept[reader, list(record.kept)] = True
        for writer, score in record.scores.items():
            self.scores[reader, writer] = score
            self.tested[reader, writer] = True
        self.metric = record.metric
        self.records.append(record)


class BatchSize(Protocol):
    """Chooses how many candidates to try at once."""

    def next(self, remaining: int, keep_rate: float) -> int:
        """Size of the next batch.

        Args:
            remaining: Edges of the reader not decided yet.
            keep_rate: Estimated probability that the next edge stays.

        Returns:
            At least 1, at most `remaining`.
        """


class FixedBatch:
    """Always the same number of candidates; 1 is the plain sequential loop.

    Args:
        size: Candidates per batch.
    """

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def next(self, remaining: int, keep_rate: float) -> int:
        """Size of the next batch."""
        return min(self.size, remaining)


class AdaptiveBatch:
    """The batch that costs least per decided edge.

    A batch of K candidates costs `overhead + K` (in units of one candidate's cost) and decides
    `(1 - (1 - p)^K) / p` edges on average when each stays with probability p: what comes after the
    first edge that stays has to be tried again. The choice depends on decisions alone, not on a clock,
    so a run repeats to the bit.

    Args:
        most: Largest batch.
        overhead: Cost of a batch beside its candidates.
    """

    def __init__(self, most: int = 64, overhead: float = 4.0) -> None:
        self._sizes = np.arange(1, most + 1)
        self._costs = overhead + self._sizes

    def next(self, remaining: int, keep_rate: float) -> int:
        """Size of the next batch."""
        p = min(max(keep_rate, 1e-6), 1 - 1e-6)
        decided = (1 - (1 - p) ** self._sizes) / p
        return min(int(self._sizes[np.argmin(self._costs / decided)]), remaining)


_RECENT = 16  # readers that tell how often edges stay
_PRIOR_WEIGHT = 30.0  # edges their testimony counts for within a reader

Observer = Callable[[Search, ReaderRecord], None]


def search(
    engine: Engine,
    config: ACDCConfig,
    *,
    batch: BatchSize | None = None,
    done: Sequence[ReaderRecord] = (),
    on_reader: Observer | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Search:
    """Run ACDC to its end.

    Args:
        engine: Computes metrics.
        config: Threshold, order, readers.
        batch: Chooses batch sizes; one candidate at a time by default.
        done: Readers finished by an earlier run, in order.
        on_reader: Called after every finished reader.
        on_batch: Called after every batch with the reader and the number of edges decided by it.

    Returns:
        The finished search.
    """
    graph = engine.graph
    state = Search.start(graph)
    chosen = graph.match_readers(config.readers)
    batch = batch or FixedBatch(1)
    for record in done:
        state.apply(record)
    measured = engine.begin(state.kept)
    if done:
        state.metric_full = float("nan")  # the caller has it in the journal's header
    else:
        state.metric = state.metric_full = measured
    finished = {record.reader for record in done}
    try:
        for reader in graph.reader_order(config.order):
            if reader in finished:
                continue
            record = _search_reader(engine, config, state, reader, bool(chosen[reader]), batch, on_batch)
            state.apply(record)
            if on_reader is not None:
                on_reader(state, record)
    finally:
        engine.finish()
    return state


def _search_reader(
    engine: Engine,
    config: ACDCConfig,
    state: Search,
    reader: int,
    searched: bool,
    batch: BatchSize,
    on_batch: Callable[[int, int], None] | None,
) -> ReaderRecord:
    graph = engine.graph
    edges = list(graph.in_edges(reader))
    if not searched:
        return ReaderRecord(reader, False, tuple(sorted(edges)), {}, state.metric)
    if not graph.has_out_edge(state.kept, reader):
        engine.remove(reader, edges)
        return ReaderRecord(reader, True, (), {}, state.metric)
    remeasured = engine.focus(reader)
    cur = state.metric if remeasured is None else remeasured
    scores: dict[int, float] = {}
    kept: list[int] = []
    prior = _keep_rate(state)
    position = 0
    while position < len(edges):
        rate = (prior * _PRIOR_WEIGHT + len(kept)) / (_PRIOR_WEIGHT + position)
        tried = edges[position : position + batch.next(len(edges) - position, rate)]
        values = engine.try_removals(reader, [tried[: k + 1] for k in range(len(tried))])
        accepted, cur = _accept(tried, values, cur, config, scores)
        engine.remove(reader, tried[:accepted])
        used = min(accepted + 1, len(tried))
        if accepted < len(tried):
            kept.append(tried[accepted])
        position += used
        if on_batch is not None:
            on_batch(reader, used)
    return ReaderRecord(reader, True, tuple(sorted(kept)), scores, cur)


def _keep_rate(state: Search) -> float:
    """Share of edges that stayed, over the readers searched last."""
    recent = [record for record in state.records[-4 * _RECENT :] if record.scores][-_RECENT:]
    tested = sum(len(record.scores) for record in recent)
    return (sum(len(record.kept) for record in recent) + 1) / (tested + 50)


def _accept(
    tried: Sequence[int],
    values: Sequence[float],
    cur: float,
    config: ACDCConfig,
    scores: dict[int, float],
) -> tuple[int, float]:
    """Walk through a batch as the sequential loop would. Returns removals accepted, and `cur` after."""
    for number, (writer, new) in enumerate(zip(tried, values, strict=True)):
        score = new - cur
        scores[writer] = score
        if (abs(score) if config.absolute else score) >= config.threshold:
            return number, cur
        cur = new
    return len(tried), cur
