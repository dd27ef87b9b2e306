"""ACDC: the greedy search over edges (Conmy et al. 2023; docs/semantics.md, section 3).

The search knows engines only by a small protocol and nothing of models. Of every reader, from the output to
the input, in four phases:

1. Cut: all its edges where nothing reads its node, else those that a screen has sorted out.
2. Focus: the engine turns to it, and may measure again what tests start from.
3. Batches: the k-th candidate lacks the next k edges. As most edges go, most of a batch is accepted at once;
   the first edge that stays ends it. Decisions are those of the sequential loop. With verified estimates
   most edges are decided by intervals instead (`intervals`).
4. Second looks, with a margin: edges whose score lies next to the threshold are tested again in FP32. The
   search goes on meanwhile as if the first decision held, looks at a few such edges together, and goes back
   to the first whose decision changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.protocol import Engine
from pahq_hf.search.acdc_options import GreedyOptions
from pahq_hf.search.audit import Audit
from pahq_hf.search.batches import BatchSize, FixedBatch
from pahq_hf.search.intervals import IntervalSearch
from pahq_hf.search.reader_search import Deciding, ReaderSearch
from pahq_hf.search.reference import Reference
from pahq_hf.search.state import ReaderRecord, Search

Observer = Callable[[Search, ReaderRecord], None]
Decider = Callable[[Deciding, Search], ReaderSearch]  # of a reader, from what is decided before it


def search(
    engine: Engine,
    config: GreedyOptions,
    *,
    batch: BatchSize | None = None,
    done: Sequence[ReaderRecord] = (),
    survivors: BoolArray | None = None,
    decider: Decider | None = None,
    reference: Reference | None = None,
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
        decider: Makes what decides the edges of a reader; ACDC's by default.
        reference: What gaps are from, where the criterion is the gap; by default the engine measures it.
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
    decider = decider or (_estimating if config.estimates else _testing)
    audit = Audit.of(config.audited, int(graph.all_edges[chosen].sum()))
    try:
        if config.decides_by == "gap" and reference is None:
            reference = Reference(engine.metric_of(graph.all_edges))
        measured = engine.begin(state.kept)
        if not done:
            state.metric = measured
        for reader in graph.reader_order(config.order):
            if reader in finished:
                continue
            if chosen[reader]:
                tested = None if survivors is None else survivors[reader]
                record = _search_reader(
                    engine, config, state, reader, tested, batch, audit, decider, reference, on_batch
                )
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
    config: GreedyOptions,
    state: Search,
    reader: int,
    survives: BoolArray | None,
    batch: BatchSize,
    audit: Audit,
    decider: Decider,
    reference: Reference | None,
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
    seen = None
    if reference is not None:
        kept = state.kept.copy()
        kept[reader, screened] = False
        seen = reference.seen(engine, kept, cur)
    rate = state.keep_rate()
    work = Deciding(engine, config, reader, tuple(screened), cur, batch, rate, audit, seen, on_batch)
    return decider(work, state).run()


def _testing(work: Deciding, before: Search) -> ReaderSearch:
    return ReaderSearch(work)


def _estimating(work: Deciding, before: Search) -> ReaderSearch:
    return IntervalSearch(work)
