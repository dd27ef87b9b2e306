"""The greedy search: against the referee on models, and against a plain loop on toy functions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pahq_hf.circuit.graph import BoolArray, Graph, GraphSpec
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.protocol import Trial
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.errors import ConfigError
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.batches import AdaptiveBatch, BatchSize, FixedBatch
from pahq_hf.search.state import ReaderRecord, Search
from tests.helpers import assert_same_search, referee, wrapped
from tests.models import random_task
from tests.tiers import examples, quick

pytestmark = pytest.mark.crossing

THRESHOLDS = {"kl": (0.003, 0.03, 0.15), "logit_diff": (0.01, 0.1, 0.4)}
TASK = random_task(batch=3, padding="right", seed=11)


def run(name: str, dtype: torch.dtype, config: ACDCConfig, batch: BatchSize | None = None) -> Search:
    metric: Any = config.metric
    engine = HooksEngine(wrapped(name, dtype=dtype).patched, TASK, metric, ablation=config.ablation)
    return search(engine, config, batch=batch)


# -- against the referee --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ablation", ["corrupted", "zero"])
@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("order", ["acdc", "head"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_search_equals_the_referees(
    name: str, order: Any, metric: Any, ablation: Any, dtype: torch.dtype
) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    sizes = set()
    thresholds = THRESHOLDS[metric] if dtype == torch.float64 else THRESHOLDS[metric][1:2]
    for threshold in thresholds:
        theirs = referee_search(name, metric, ablation, threshold, order)
        config = ACDCConfig(threshold=threshold, metric=metric, order=order, ablation=ablation)
        ours = run(name, dtype, config)
        assert_same_search(ours, theirs, tolerance)
        sizes.add(len(theirs.kept))
        assert theirs.kept and len(theirs.kept) < len(theirs.tested)
    assert len(sizes) == len(thresholds)


@cache
def referee_search(name: str, metric: str, ablation: str, threshold: float, order: str) -> Any:
    return referee(name, TASK, metric=metric, ablation=ablation).acdc(threshold, order=order)


@pytest.mark.parametrize("name", ["gpt2", "llama_split"])
def test_absolute_scores(name: str) -> None:
    """Edges whose removal lowers the metric much are kept too."""
    config = ACDCConfig(threshold=0.1, metric="logit_diff", absolute=True)
    ours = run(name, torch.float64, config)
    theirs = referee(name, TASK, metric="logit_diff").acdc(0.1, criterion="absolute")
    assert_same_search(ours, theirs, 1e-9)
    assert (ours.scores[ours.kept] < -0.1).any()


def test_readers_outside_the_search_keep_their_edges() -> None:
    config = ACDCConfig(threshold=0.03, metric="kl", readers="logits, m1,a0.*<v>")
    ours = run("llama", torch.float64, config)
    chosen = {"logits", "m1", "a0.kv0<v>", "a0.kv1<v>"}
    assert_same_search(ours, referee("llama", TASK).acdc(0.03, readers=chosen), 1e-9)
    graph = ours.graph
    for r, reader in enumerate(graph.readers):
        whole = np.array_equal(ours.kept[r], graph.all_edges[r])
        assert whole or reader.name in chosen
        assert ours.tested[r].any() == (reader.name in chosen)
    assert {graph.readers[r.reader].name for r in ours.records if r.searched} == chosen
    with pytest.raises(ConfigError, match="no reader matches 'm7'"):
        run("llama", torch.float64, ACDCConfig(metric="kl", readers="logits,m7"))


def test_batches_of_a_model_decide_like_the_sequential_loop() -> None:
    config = ACDCConfig(threshold=0.03, metric="kl")
    one, *others = (run("llama", torch.float32, config, FixedBatch(size)) for size in (1, 2, 7, 64))
    for other in (*others, run("llama", torch.float32, config, AdaptiveBatch())):
        assert other.records == one.records


def test_search_leaves_the_engine_at_the_circuit_it_found() -> None:
    engine = HooksEngine(wrapped("llama", dtype=torch.float64).patched, TASK, "kl")
    found = search(engine, ACDCConfig(threshold=0.03), batch=FixedBatch(5))
    assert found.metric == pytest.approx(engine.metric_of(found.kept), abs=1e-12)
    last = found.records[-1].reader
    gone = np.flatnonzero(engine.graph.all_edges[last] & ~found.kept[last]).tolist()
    assert engine.try_(last, [gone]).values == (engine.metric_of(found.kept),)


# -- toy engines ----------------------------------------------------------------------------------------


class Toy:
    """A random nonlinear function of the edge set, drawn from a seed."""

    def __init__(self, graph: Graph, seed: int, *, jumps: bool = False) -> None:
        self.graph = graph
        self.evaluations = 0
        draw = np.random.default_rng(seed)
        self._inner = draw.normal(size=(6, *graph.all_edges.shape))
        self._outer = draw.normal(size=6)
        self._jumps = draw.normal(size=len(graph.readers)) if jumps else np.zeros(len(graph.readers))
        self.kept = graph.all_edges.copy()
        self.reader = -1
        self.finished = 0

    def value(self, kept: BoolArray, reader: int = -1) -> float:
        """The metric of an edge set, seen while turned to a reader."""
        inside = np.tanh((self._inner * kept).sum((1, 2)) / 2)
        return float(self._outer @ inside) * (1 + 0.1 * (self._jumps[reader] if reader >= 0 else 0))

    def begin(self, kept: BoolArray) -> float:
        self.kept = kept.copy()
        return self.value(self.kept)

    def focus(self, reader: int) -> float | None:
        """With jumps the metric changes with the reader in focus, as it does with precision."""
        if not self._jumps.any():
            return None
        self.reader = reader
        return self.value(self.kept, reader)

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        values = []
        for writers in candidates:
            self.evaluations += 1
            kept = self.kept.copy()
            kept[reader] = self.graph.all_edges[reader]
            kept[reader, list(writers)] = False
            values.append(self.value(kept, self.reader))
        return Trial.of(reader, candidates, values)

    def accept(self, trial: Trial, k: int) -> None:
        self.cut(trial.reader, trial.candidates[k])

    def cut(self, reader: int, writers: Sequence[int]) -> None:
        self.kept[reader] = self.graph.all_edges[reader]
        self.kept[reader, list(writers)] = False

    def finish(self) -> None:
        self.finished += 1


def plain_loop(toy: Toy, config: ACDCConfig) -> tuple[BoolArray, dict[tuple[int, int], float], float]:
    """Semantics 3 in a dozen lines: kept edges, scores in the order of the tests, final metric."""
    graph, kept, scores, focus = toy.graph, toy.graph.all_edges.copy(), {}, -1
    cur = toy.value(kept)
    for reader in graph.reader_order(config.order):
        nodes = list(graph.readers[reader].nodes)
        if nodes and not kept[:, nodes].any():
            kept[reader] = False
            continue
        if toy._jumps.any():
            focus = reader
            cur = toy.value(kept, focus)
        for writer in reversed(range(int(graph.prefix[reader]))):
            kept[reader, writer] = False
            new = toy.value(kept, focus)
            score = scores[reader, writer] = new - cur
            if (abs(score) if config.absolute else score) < config.threshold:
                cur = new
            else:
                kept[reader, writer] = True
    return kept, scores, cur


class Moody:
    """Batch sizes from a given cycle, and a record of them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = itertools.cycle(sizes)
        self.tried: list[int] = []

    def next(self, remaining: int, keep_rate: float) -> int:
        assert remaining >= 1
        assert 0 <= keep_rate <= 1
        self.tried.append(min(next(self._sizes), remaining))
        return self.tried[-1]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    groups = draw(st.integers(1, 2))
    return Graph(
        GraphSpec(
            layers=draw(st.integers(1, 2)),
            heads=groups * draw(st.integers(1, 2)),
            kv_groups=groups,
            mlps=draw(st.booleans()),
            parallel=draw(st.booleans()),
            split_kv_groups=draw(st.booleans()),
        )
    )


configs = st.builds(
    ACDCConfig,
    threshold=st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0]),
    order=st.sampled_from(["acdc", "head"]),
    absolute=st.booleans(),
)
seeds = st.integers(0, 2**32 - 1)


@examples(150)
@given(graphs(), configs, seeds, st.lists(st.integers(1, 70), min_size=1, max_size=6), st.booleans())
def test_any_batches_decide_like_the_plain_loop(
    graph: Graph, config: ACDCConfig, seed: int, sizes: list[int], jumps: bool
) -> None:
    toy, batch = Toy(graph, seed, jumps=jumps), Moody(sizes)
    seen: list[int] = []
    found = search(toy, config, batch=batch, on_batch=lambda _, used: seen.append(used))
    kept, scores, final = plain_loop(Toy(graph, seed, jumps=jumps), config)
    assert np.array_equal(found.kept, kept)
    order = [(r.reader, w) for r in found.records for w in r.scores]
    assert order == list(scores)
    assert [found.scores[edge] for edge in scores] == list(scores.values())
    assert {(int(r), int(w)) for r, w in np.argwhere(found.tested)} == set(scores)
    assert not found.scores[~found.tested].any()
    assert found.metric == final
    assert np.array_equal(toy.kept, kept)
    # Every edge is decided once, at least one by every batch.
    assert sum(seen) == len(scores)
    assert all(1 <= used <= tried for tried, used in zip(batch.tried, seen, strict=True))
    assert toy.evaluations == sum(batch.tried)
    assert toy.finished == 1


@examples(40)
@given(graphs(), configs, seeds, st.booleans())
def test_a_search_continued_from_any_record_is_the_same(
    graph: Graph, config: ACDCConfig, seed: int, jumps: bool
) -> None:
    whole = search(Toy(graph, seed, jumps=jumps), config)
    calls = batch_calls(Toy(graph, seed, jumps=jumps), config, [])
    for cut in range(len(whole.records) + 1):
        later: list[ReaderRecord] = []
        toy = Toy(graph, seed, jumps=jumps)
        rest = search(
            toy,
            config,
            batch=FixedBatch(3),
            done=whole.records[:cut],
            on_reader=lambda _, record, later=later: later.append(record),
        )
        assert rest.records == whole.records
        assert later == whole.records[cut:]
        assert np.array_equal(rest.kept, whole.kept)
        assert np.array_equal(rest.scores, whole.scores)
        assert np.array_equal(rest.tested, whole.tested)
        assert rest.metric == whole.metric
        # The batches are the same too: what chooses them are decisions, not how long anything took.
        assert batch_calls(Toy(graph, seed, jumps=jumps), config, whole.records[:cut]) == [
            call for call in calls if call[0] in {record.reader for record in later}
        ]


def batch_calls(
    toy: Toy, config: ACDCConfig, done: Sequence[ReaderRecord]
) -> list[tuple[int, list[list[int]]]]:
    """Every batch an adaptive search tries: its reader and its candidates."""
    calls: list[tuple[int, list[list[int]]]] = []
    original = toy.try_

    def spy(reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        calls.append((reader, [list(candidate) for candidate in candidates]))
        return original(reader, candidates)

    toy.try_ = spy  # type: ignore[method-assign]
    search(toy, config, batch=AdaptiveBatch(), done=done)
    return calls


def test_a_models_search_continued_from_any_record_is_the_same() -> None:
    config = ACDCConfig(threshold=0.05, metric="kl", order="head")
    whole = run("llama", torch.float32, config)
    for cut in range(0, len(whole.records) + 1, 3):
        engine = HooksEngine(wrapped("llama").patched, TASK, "kl")
        rest = search(engine, config, done=whole.records[:cut])
        assert [asdict(record) for record in rest.records] == [asdict(record) for record in whole.records]
        assert np.array_equal(rest.kept, whole.kept)


@pytest.mark.parametrize("order", quick(["acdc", "head"], "acdc"))
def test_a_literal_search_continued_from_any_record_is_the_same(order: Any) -> None:
    """The paper's rule carries state from reader to reader: which component is FP32 now."""
    config = ACDCConfig(threshold=0.05, metric="kl", order=order)
    model = wrapped("gpt2", regime="pahq-literal").patched
    engine = HooksEngine(model, TASK, "kl", rule=RegimeRule(raise_active=True))
    whole = search(engine, config)
    assert not engine.session.holding.active
    for cut in range(0, len(whole.records) + 1, 4):
        engine = HooksEngine(model, TASK, "kl", rule=RegimeRule(raise_active=True))
        rest = search(engine, config, done=whole.records[:cut])
        assert rest.records == whole.records


class Counting(Toy):
    """Every removal costs a quarter."""

    def value(self, kept: BoolArray, reader: int = -1) -> float:
        return float((self.graph.all_edges & ~kept).sum()) / 4


class Broken(Counting):
    """Fails after its tenth measurement."""

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        if self.evaluations >= 10:
            raise KeyboardInterrupt
        return super().try_(reader, candidates)


def test_an_interrupted_search_lets_go_of_the_engine() -> None:
    toy = Broken(Graph(GraphSpec(2, 2, 2)), 0)
    records: list[ReaderRecord] = []
    with pytest.raises(KeyboardInterrupt):
        search(toy, ACDCConfig(threshold=0.1), on_reader=lambda _, record: records.append(record))
    assert toy.finished == 1
    assert records


def test_an_edge_at_the_threshold_stays() -> None:
    """The comparison is strict: `new - cur < tau` removes."""
    graph = Graph(GraphSpec(1, 1, 1))
    stays = search(Counting(graph, 0), ACDCConfig(threshold=0.25))
    goes = search(Counting(graph, 0), ACDCConfig(threshold=0.2500001))
    assert stays.kept.sum() == graph.edge_count
    assert not goes.kept.any()
    # With no edge into logits kept, everything upstream goes untested.
    assert goes.tested.sum() == graph.prefix[graph.logits_reader]


def test_fixed_batch_takes_what_remains() -> None:
    batch = FixedBatch(4)
    assert [batch.next(n, 0.5) for n in (9, 5, 4, 3, 1)] == [4, 4, 4, 3, 1]


def test_candidates_are_nested() -> None:
    """The k-th lacks the next k edges beside those that are gone, in the order of the sequential loop."""
    graph = Graph(GraphSpec(2, 2, 1))
    decided: dict[int, int] = {}
    for reader, candidates in batch_calls(Toy(graph, 3), ACDCConfig(threshold=0.05), []):
        order = list(graph.in_edges(reader))
        *gone, first = candidates[0]
        start = order.index(first)
        assert start >= decided.get(reader, 0) and set(gone) <= set(order[:start])
        assert candidates == [[*gone, *order[start : start + k]] for k in range(1, len(candidates) + 1)]
        decided[reader] = start + 1
    assert len(decided) > 2


def test_adaptive_batches_grow_as_fewer_edges_stay() -> None:
    """Each size costs least per edge that its batch decides on average."""
    batch = AdaptiveBatch(most=64, overhead=4.0)
    sizes = [batch.next(1000, rate) for rate in (0.0, 0.01, 0.1, 0.5, 1.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64 and 1 < sizes[2] < sizes[1] < 64
    assert batch.next(3, 0.0) == 3
    for rate in (0.01, 0.1, 0.5):

        def cost(size: int, rate: float = rate) -> float:
            decided = sum((1 - rate) ** k for k in range(size))  # the k-th result counts if all before it go
            return (4 + size) / decided

        assert batch.next(1000, rate) == min(range(1, 65), key=cost)
