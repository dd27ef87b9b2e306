"""ACDC with verified estimates decides as ACDC that tests every edge, with fewer tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pahq_hf.capture.recording import capture
from pahq_hf.circuit.estimates import most_wrong
from pahq_hf.circuit.graph import Graph
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.protocol import Slopes, Trial
from pahq_hf.engine.setting import Setting
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.acdc_run import with_margin
from pahq_hf.search.audit import Audit
from pahq_hf.search.batches import AdaptiveBatch
from pahq_hf.search.intervals import IntervalSearch
from pahq_hf.search.reader_search import Deciding
from pahq_hf.search.state import ReaderRecord, Search
from pahq_hf.search.way import Estimates, Floats
from tests.helpers import wrapped
from tests.models import random_task


def found(
    regime: str,
    metric: str,
    tests: Any,
    audit: float | None = None,
    kind: Any = "sparse",
) -> Search:
    model = wrapped("llama", regime=regime, layers=4)
    task = random_task(batch=3, length=6, padding="right", seed=17)
    setting = Setting(model.patched, task, metric, "corrupted", model.pahq_config)
    config = with_margin(ACDCConfig(threshold=0.2, tests=tests, audit=audit), model.pahq_config)
    return search(make_engine(setting, EngineConfig(kind)), config, batch=AdaptiveBatch())


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("regime", ["fp32", "pahq", "rtn"])
def test_decisions_are_those_of_testing_every_edge(regime: str, metric: str) -> None:
    every, ours = (found(regime, metric, tests) for tests in ("all", "verified"))
    assert np.array_equal(every.kept, ours.kept) and np.array_equal(every.tested, ours.tested)
    assert ours.metric == pytest.approx(every.metric, abs=1e-5)
    assert not any(record.estimated for record in every.records)
    assert sum(len(record.estimated) for record in ours.records) > 5


def test_scores_of_a_reader_add_up_to_what_it_moved_the_metric_by() -> None:
    search, before = found("fp32", "logit_diff", "verified", audit=0.0), None
    for record in search.records:
        if before is not None:
            removed = sum(score for writer, score in record.scores.items() if writer not in record.kept)
            assert record.metric == pytest.approx(before + removed, abs=1e-9)
        before = record.metric


class Lying:
    """An engine of which every edge has a score of its own, and whose slopes are what it says they are.

    Attributes:
        graph: The graph.
        scores: What removing each of a reader's edges adds. [edges]
        said: What its slopes say. [edges]
        moved: By what share they move from one circuit to the next.
        sizes: Lengths of what edges carry. [edges]
    """

    def __init__(self, graph: Graph, scores: Floats, said: Floats, moved: float = 0.01) -> None:
        self.graph, self.scores, self.said, self.moved = graph, scores, said, moved
        self.sizes = np.ones(len(scores))

    def _metric(self, gone: Sequence[int]) -> float:
        return float(self.scores[list(gone)].sum())

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        return Trial.of(reader, candidates, [self._metric(gone) for gone in candidates])

    def slopes(self, reader: int, candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Slopes:
        steps = np.linspace(1 - self.moved / 2, 1 + self.moved / 2, len(candidates))[:, None]
        effects = steps * self.said[list(writers)]
        return Slopes(self.try_(reader, candidates), tuple(writers), effects, self.sizes[list(writers)])

    def accept(self, trial: Trial, k: int) -> None:
        pass

    def cut(self, reader: int, writers: Sequence[int]) -> None:
        pass


def decided(engine: Lying, share: float) -> ReaderRecord:
    reader = engine.graph.logits_reader
    config = ACDCConfig(threshold=1.0, tests="verified", audit=share)
    work = Deciding(engine, config, reader, (), 0.0, AdaptiveBatch(), 0.01, Audit(share))  # type: ignore[arg-type]
    return IntervalSearch(work).run()


def test_an_edge_that_its_correction_takes_to_the_threshold_stays() -> None:
    """What the estimates miss in all, less than is allowed, is one edge's."""
    graph = wrapped("llama").patched.graph
    scores = np.zeros(len(graph.writers))
    said = scores.copy()
    scores[5], said[5] = 1.02, 0.69
    record = decided(Lying(graph, scores, said), share=0.0)
    assert record.kept == (5,) and record.scores[5] == pytest.approx(1.02)


def test_the_audit_mends_what_estimates_got_wrong() -> None:
    """Two errors that cancel: no sum tells, but whoever tests one of them knows."""
    graph = wrapped("llama").patched.graph
    scores = np.zeros(len(graph.writers))
    said = scores.copy()
    scores[5], scores[6] = 1.5, -1.5
    blind, audited = (decided(Lying(graph, scores, said), share) for share in (0.0, 1.0))
    assert blind.kept == () and blind.counts.wrong == 0
    assert audited.kept == (5,) and audited.counts.wrong == 1
    assert audited.scores[6] == pytest.approx(-1.5) or 6 in audited.estimated
    assert audited.counts.audited >= len(audited.estimated)


def test_errors_that_cancel_are_seen_where_slopes_move_far() -> None:
    """Between two measured circuits slopes may not move by more than the threshold, all together."""
    graph = wrapped("llama").patched.graph
    scores, said = np.zeros(len(graph.writers)), np.zeros(len(graph.writers))
    last = max(graph.in_edges(graph.logits_reader))
    scores[1], scores[last] = -1.5, 1.5  # they cancel, at either end of the way
    said[2 : last - 1] = 0.3  # halves of it cancel too, and slopes move on the way
    said[2 : last - 1 : 2] *= -1
    scores += said
    record = decided(Lying(graph, scores, said, moved=2.0), share=0.0)
    assert record.kept == (last,)


def test_estimates_are_exact_where_the_metric_is_quadratic_along_one_direction() -> None:
    steps = np.array([0.3, -0.1, 0.4, 0.2])
    ends = np.cumsum(steps)
    starts = ends - steps
    # m(t) = 2 t + 3 t^2 of how far the way went
    slopes = [steps * (2 + 6 * at) for at in (0.0, ends[-1])]
    estimates = Estimates.between(*slopes)
    exact = 2 * steps + 3 * (ends**2 - starts**2)
    np.testing.assert_allclose(estimates.scores, exact, atol=1e-12)
    assert estimates.adding_up(slice(1, 3), 5.0).sum() == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("audited", "wrong", "limit"),
    [(300, 0, 1 - 0.05 ** (1 / 300)), (60, 0, 1 - 0.05 ** (1 / 60)), (100, 1, 0.04656), (20, 3, 0.34366)],
)
def test_the_limit_is_that_of_clopper_and_pearson(audited: int, wrong: int, limit: float) -> None:
    assert most_wrong(audited, wrong) == pytest.approx(limit, abs=1e-5)
    at_limit = sum(math.comb(audited, k) * limit**k * (1 - limit) ** (audited - k) for k in range(wrong + 1))
    assert at_limit == pytest.approx(0.05, abs=1e-4)
    assert most_wrong(0, 0) == 1.0


def test_an_edge_is_drawn_or_not_whatever_else_is_asked() -> None:
    audit = Audit.of(0.3, edges=10_000)
    drawn = audit.drawn(7, range(200))
    assert 30 < len(drawn) < 90
    assert audit.drawn(7, [*drawn, 300])[: len(drawn)] == drawn
    assert audit.drawn(8, range(200)) != drawn
    assert Audit.of(0.0, edges=10).drawn(0, range(10)) == []
    assert Audit.of(0.02, edges=10).drawn(0, range(10)) == list(range(10))


def test_an_edge_that_carries_much_is_alone_where_slopes_move() -> None:
    """It bends the way by itself, which slopes at the ends do not tell, and another such error hides it."""
    graph = wrapped("llama").patched.graph
    edges = list(graph.in_edges(graph.logits_reader))
    scores, said = np.zeros(len(graph.writers)), np.zeros(len(graph.writers))
    scores[edges[2]], scores[edges[3]] = 1.5, -1.5
    said[edges[4:]] = 0.3
    scores += said
    engine = Lying(graph, scores, said, moved=2.0)
    engine.sizes[edges[0]] = 10.0
    blind = decided(engine, share=0.0)
    engine.sizes[edges[2:4]] = 100.0
    assert edges[2] not in blind.kept and edges[2] in decided(engine, share=0.0).kept


@pytest.mark.parametrize("kind", ["sparse", "hooks"])
def test_slopes_tell_how_much_edges_carry(kind: Any) -> None:
    model = wrapped("gpt2")
    task = random_task(batch=2, length=5, padding="none", seed=3)
    engine = make_engine(
        Setting(model.patched, task, "nll", "corrupted", model.pahq_config), EngineConfig(kind)
    )
    graph = engine.graph
    reader, writers = graph.logits_reader, list(graph.in_edges(graph.logits_reader))
    sizes = engine.slopes(reader, [[]], writers).sizes
    clean, corrupted = (capture(model.patched, task, ids) for ids in (task.clean_ids, task.corrupted_ids))
    last = (clean.mlp[-1] - corrupted.mlp[-1])[task.answer_rows, task.answer_positions]
    number = writers.index(graph.mlp_writer(graph.spec.layers - 1))
    whole = (clean.mlp[-1] - corrupted.mlp[-1]).norm()
    expected = last.norm() if kind == "sparse" else whole  # the sparse engine computes answers alone there
    assert sizes[number] == pytest.approx(float(expected), rel=1e-5)
    assert sizes.shape == (len(writers),) and (sizes > 0).all()
