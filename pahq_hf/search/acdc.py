"""ACDC: the greedy search over edges (Conmy et al. 2023; docs/semantics.md, section 3).

The search knows engines only by a small protocol and nothing of models. Of every reader, from the output to
the input, in four phases:

1. Cut: all its edges where nothing reads its node, else those that a screen has sorted out.
2. Focus: the engine turns to it, and may measure again what tests start from.
3. Batches: the k-th candidate lacks the next k edges. As most edges go, most of a batch is accepted at once;
   the first edge that stays ends it. Decisions are those of the sequential loop.
4. Second looks, with a margin: edges whose score lies next to the threshold are tested again in FP32. The
   search goes on meanwhile as if the first decision held, looks at a few such edges together, and goes back
   to the first whose decision changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.protocol import Engine
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.batches import BatchSize, FixedBatch
from pahq_hf.search.state import ReaderRecord, Search

_PRIOR_WEIGHT = 30.0  # edges their testimony counts for within a reader
_LOOKS = 4  # edges looked at together: weights are read once for all, and little is undone on a change

Observer = Callable[[Search, ReaderRecord], None]


def search(
    engine: Engine,
    config: ACDCConfig,
    *,
    batch: BatchSize | None = None,
    done: Sequence[ReaderRecord] = (),
    survivors: BoolArray | None = None,
    on_reader: Observer | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Search:
    """Run ACDC to its end.

    Args:
        engine: Computes metrics.
        config: Threshold, order, readers.
        batch: Chooses batch sizes; one candidate at a time by default.
        done: Readers finished by an earlier run, in order.
        survivors: Edges to be tested; the others are removed untested. All by default. [readers, writers]
        on_reader: Called after every finished reader.
        on_batch: Called with the reader and the number of edges just decided, negative when undone.

    Returns:
        The finished search.
    """
    graph = engine.graph
    state = Search.start(graph)
    chosen = graph.match_readers(config.readers)
    batch = batch or FixedBatch(1)
    for record in done:
        state.apply(record)
    finished = {record.reader for record in done}
    try:
        measured = engine.begin(state.kept)
        if not done:
            state.metric = measured
        for reader in graph.reader_order(config.order):
            if reader in finished:
                continue
            if chosen[reader]:
                tested = None if survivors is None else survivors[reader]
                record = _search_reader(engine, config, state, reader, tested, batch, on_batch)
            else:
                record = ReaderRecord(reader, False, tuple(sorted(graph.in_edges(reader))), {}, state.metric)
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
    survives: BoolArray | None,
    batch: BatchSize,
    on_batch: Callable[[int, int], None] | None,
) -> ReaderRecord:
    graph = engine.graph
    edges = list(graph.in_edges(reader))
    if not graph.has_out_edge(state.kept, reader):
        engine.cut(reader, edges)
        return ReaderRecord(reader, True, (), {}, state.metric)
    screened = [] if survives is None else [writer for writer in edges if not survives[writer]]
    if screened:  # before the focus: where tests start from anchors, it makes them those without these edges
        engine.cut(reader, screened)
    cur = engine.focus(reader)
    if cur is None:
        cur = engine.try_(reader, [screened]).values[0] if screened else state.metric
    decided = _ReaderSearch(engine, config, reader, screened, cur, batch, state.keep_rate(), on_batch)
    return decided.run()


@dataclass(frozen=True)
class _Look:
    """An edge that waits for its second look.

    Attributes:
        position: Its place among the reader's edges.
        removed: Edges gone when it was tested.
        cur: The metric before it was tested.
        new: The metric without it.
        stays: What was decided.
    """

    position: int
    removed: int
    cur: float
    new: float
    stays: bool


class _ReaderSearch:
    """Decides the edges of one reader, in order."""

    def __init__(
        self,
        engine: Engine,
        config: ACDCConfig,
        reader: int,
        screened: Sequence[int],
        cur: float,
        batch: BatchSize,
        keep_rate: float,
        on_batch: Callable[[int, int], None] | None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._reader = reader
        gone = set(screened)
        self._edges = [writer for writer in engine.graph.in_edges(reader) if writer not in gone]
        self._cur = cur
        self._batch = batch
        self._prior = keep_rate
        self._on_batch = on_batch
        self._position = 0  # edges before it are decided
        self._kept: list[int] = []
        self._removed = list(screened)
        self._scores: dict[int, float] = {}
        self._waiting: list[_Look] = []
        self._looks = self._changed = 0

    def run(self) -> ReaderRecord:
        """Decide them all."""
        while self._position < len(self._edges):
            self._try_batch()
            if len(self._waiting) >= _LOOKS or self._position == len(self._edges):
                self._look_again()
        kept = tuple(sorted(self._kept))
        return ReaderRecord(self._reader, True, kept, self._scores, self._cur, self._looks, self._changed)

    def _try_batch(self) -> None:
        rate = (self._prior * _PRIOR_WEIGHT + len(self._kept)) / (_PRIOR_WEIGHT + self._position)
        size = self._batch.next(len(self._edges) - self._position, rate)
        tried = self._edges[self._position : self._position + size]
        candidates = [[*self._removed, *tried[: k + 1]] for k in range(len(tried))]
        trial = self._engine.try_(self._reader, candidates)
        before, gone = self._position, len(self._removed)
        for writer, new in zip(tried, trial.values, strict=True):
            stays = self._decide(writer, new)
            self._position += 1
            if stays:
                break
        if len(self._removed) > gone:
            self._engine.accept(trial, len(self._removed) - gone - 1)
        self._report(self._position - before)

    def _decide(self, writer: int, new: float) -> bool:
        """Decide one edge as the sequential loop does. Returns whether it stays."""
        score = new - self._cur
        self._scores[writer] = score
        stays = self._config.stays(score)
        if self._is_near(score):
            look = _Look(self._position, len(self._removed), self._cur, new, stays)
            self._waiting.append(look)
        (self._kept if stays else self._removed).append(writer)
        if not stays:
            self._cur = new
        return stays

    def _is_near(self, score: float) -> bool:
        margin, tau = self._config.margin or 0.0, self._config.threshold
        if margin in (0.0, math.inf):
            return margin > 0
        return abs((abs(score) if self._config.absolute else score) - tau) <= margin * tau

    def _look_again(self) -> None:
        """Test waiting edges again, in FP32, and go back to the first whose decision changes."""
        looks, self._waiting = self._waiting, []
        if not looks:
            return
        candidates: list[list[int]] = []
        for look in looks:
            gone = self._removed[: look.removed]
            candidates += [gone, [*gone, self._edges[look.position]]]
        trial = self._engine.look_again(self._reader, candidates)
        self._looks += len(looks)
        for number, look in enumerate(looks):
            without, with_it = 2 * number + 1, 2 * number
            score = trial.values[without] - trial.values[with_it]
            self._scores[self._edges[look.position]] = score
            if self._config.stays(score) is not look.stays:
                self._changed += 1
                self._engine.accept(trial, without if look.stays else with_it)
                self._return_to(look)
                return

    def _return_to(self, look: _Look) -> None:
        """Reverse the decision about an edge and forget all later ones."""
        writer = self._edges[look.position]
        undone = set(self._edges[look.position : self._position])
        self._removed = self._removed[: look.removed]
        self._kept = [w for w in self._kept if w not in undone]
        for later in undone - {writer}:
            self._scores.pop(later, None)
        self._report(look.position + 1 - self._position)
        self._position = look.position + 1
        if look.stays:
            self._removed.append(writer)
            self._cur = look.new
        else:
            self._kept.append(writer)
            self._cur = look.cur

    def _report(self, decided: int) -> None:
        if self._on_batch is not None and decided:
            self._on_batch(self._reader, decided)
