"""Estimates along a foretold way decide as tests do, where metrics are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.engine.protocol import Slopes, Trial
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.audit import Audit
from pahq_hf.search.batches import AdaptiveBatch
from pahq_hf.search.intervals import IntervalSearch
from pahq_hf.search.reader_search import Deciding, ReaderSearch
from pahq_hf.search.state import ReaderRecord
from pahq_hf.search.way import Floats, IntervalRule, Point, Way
from tests.tiers import examples

GRAPH = Graph(GraphSpec(layers=10, heads=8, kv_groups=8))
EDGES = len(GRAPH.writers)


@dataclass
class Saturating:
    """An engine whose metric is `a |tanh(D x)|^2 / 2 + s x`, x saying which edges are gone.

    Attributes:
        carried: D; what each edge carries along some directions. [directions, edges]
        slopes_there: s; what it adds besides. [edges]
        bend: How soon the metric saturates; with 0 it is quadratic.
        unseen: What edges add that no slope tells: their own steps bend the way there and back. [edges]
        noise: By how much the metric of a test or of slopes is off, at most; of a second look it never is.
    """

    carried: Floats
    slopes_there: Floats
    bend: float
    noise: float = 0.0
    unknown: tuple[int, ...] = ()  # edges without slopes
    unseen: Floats = field(default_factory=lambda: np.zeros(EDGES))
    evaluations: int = 0
    graph: Graph = GRAPH

    def _metric(self, gone: Sequence[int]) -> tuple[float, Floats]:
        """The metric, and its slopes in every edge. [edges]"""
        x = np.zeros(EDGES)
        x[list(gone)] = 1.0
        at = self.carried @ x
        if self.bend:
            squashed = np.tanh(self.bend * at) / self.bend
            inner = squashed * (1 - np.tanh(self.bend * at) ** 2)
        else:
            squashed = inner = at
        self.evaluations += 1
        return float(
            squashed @ squashed / 2 + (self.slopes_there + self.unseen) @ x
        ), inner @ self.carried + self.slopes_there

    def _off(self, gone: Sequence[int]) -> float:
        """The same for the same circuit, in whatever order its edges went."""
        return self.noise * float(np.random.default_rng(sorted(gone)).uniform(-1, 1)) if self.noise else 0.0

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        return Trial.of(reader, candidates, [self._metric(gone)[0] + self._off(gone) for gone in candidates])

    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        return Trial.of(reader, candidates, [self._metric(gone)[0] for gone in candidates])

    def slopes(self, reader: int, candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Slopes:
        found = [self._metric(gone) for gone in candidates]
        every = np.array([slopes for _, slopes in found])
        every[-1, list(self.unknown)] = np.nan
        effects = every[:, list(writers)]
        sizes = np.linalg.norm(self.carried, axis=0)[list(writers)]
        values = [value + self._off(gone) for (value, _), gone in zip(found, candidates, strict=True)]
        trial = Trial.of(reader, candidates, values)
        return Slopes(trial, tuple(writers), effects, sizes)

    def accept(self, trial: Trial, k: int) -> None:
        pass

    def cut(self, reader: int, writers: Sequence[int]) -> None:
        pass


def random_engine(seed: int, bend: float, noise: float = 0.0) -> Saturating:
    """A few edges carry much, most next to nothing, as in models."""
    rng = np.random.default_rng(seed)
    heavy = np.exp(rng.normal(-3.5, 1.3, EDGES))
    carried = rng.normal(size=(int(rng.integers(1, 12)), EDGES)) * heavy
    return Saturating(carried, rng.normal(size=EDGES) * heavy * rng.choice([0.0, 0.5]), bend, noise)


def decided(
    kind: type[ReaderSearch],
    engine: Saturating,
    share: float,
    absolute: bool,
    tau: float = 0.1,
    margin: float = 0.0,
) -> ReaderRecord:
    config = ACDCConfig(threshold=tau, tests="verified", audit=share, absolute=absolute, margin=margin)
    work = Deciding(
        engine=engine,  # type: ignore[arg-type]
        config=config,
        reader=GRAPH.logits_reader,
        screened=(),
        cur=engine._metric([])[0],
        batch=AdaptiveBatch(),
        keep_rate=0.01,
        audit=Audit(share),
    )
    return kind(work).run()


@pytest.mark.crossing
@pytest.mark.parametrize("bend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("absolute", [False, True])
def test_decisions_are_those_of_tests(absolute: bool, bend: float) -> None:
    """Flips are counted: where errors cancel one decision in thousands may be wrong."""
    flipped = tests = evaluations = estimated = edges = 0
    for seed in range(40):
        engines = random_engine(seed, bend), random_engine(seed, bend)
        every = decided(ReaderSearch, engines[0], 0.0, absolute)
        ours = decided(IntervalSearch, engines[1], 0.0, absolute)
        assert set(ours.scores) == set(every.scores) == set(GRAPH.in_edges(GRAPH.logits_reader))
        for writer in set(ours.scores) - set(ours.estimated):
            if every.kept == ours.kept:
                assert ours.scores[writer] == pytest.approx(every.scores[writer], abs=1e-9)
        flipped += every.kept != ours.kept
        tests, evaluations = tests + engines[0].evaluations, evaluations + engines[1].evaluations
        estimated, edges = estimated + len(ours.estimated), edges + len(ours.scores)
    assert flipped <= 1
    assert evaluations < 0.8 * tests and estimated > 0.4 * edges


@examples(200)
@given(seed=st.integers(0, 2**32 - 1), bend=st.sampled_from([0.0, 0.5]), absolute=st.booleans())
def test_with_all_audited_decisions_are_those_of_tests(seed: int, bend: float, absolute: bool) -> None:
    """Whatever estimates say, every edge that goes has been tested in its own circuit."""
    every = decided(ReaderSearch, random_engine(seed, bend), 0.0, absolute)
    ours = decided(IntervalSearch, random_engine(seed, bend), 1.0, absolute)
    assert ours.kept == every.kept
    assert ours.metric == pytest.approx(every.metric, abs=1e-9)
    assert ours.counts.audited == len(ours.estimated) + ours.counts.wrong


@examples(100)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.2, 1.0]), st.sampled_from([0.3, math.inf]))
def test_counts_fit_where_second_looks_go_back(seed: int, share: float, margin: float) -> None:
    """Tests are off by up to a threshold, second looks are not: searches go back, and forget audits."""
    ours = decided(IntervalSearch, random_engine(seed, 0.3, noise=0.1), share, absolute=False, margin=margin)
    counts, looked_at = ours.counts, ours.scores.keys() - set(ours.estimated)
    assert 0 <= counts.wrong <= counts.audited <= len(ours.estimated) + counts.wrong
    assert counts.wrong <= len(ours.kept) and not set(ours.kept) & set(ours.estimated)
    if margin == math.inf and share == 1.0:  # every decision is that of a second look
        every = decided(ReaderSearch, random_engine(seed, 0.3), 0.0, absolute=False)
        assert ours.kept == every.kept and looked_at


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_edges_whose_slopes_are_no_numbers_are_tested(share: float) -> None:
    for seed in range(10):
        every = decided(ReaderSearch, random_engine(seed, 0.3), 0.0, absolute=False)
        engine = random_engine(seed, 0.3)
        engine.unknown = tuple(np.flatnonzero(np.random.default_rng(seed).random(EDGES) < share).tolist())
        ours = decided(IntervalSearch, engine, 0.0, absolute=False)
        assert ours.kept == every.kept and not any(np.isnan(score) for score in ours.scores.values())
        if share == 1.0:
            assert not ours.estimated


@pytest.mark.parametrize("size", [0.0, 1.0])
@pytest.mark.parametrize("tau", [0.0, 1e-310])
def test_a_threshold_of_nothing(tau: float, size: float) -> None:
    """Of a metric that moves, and of one that does not."""
    engines = [random_engine(3, 0.3) for _ in range(2)]
    for engine in engines:
        engine.carried *= size
        engine.slopes_there *= size
    every = decided(ReaderSearch, engines[0], 0.0, absolute=False, tau=tau)
    ours = decided(IntervalSearch, engines[1], 0.0, absolute=False, tau=tau)
    assert ours.kept == every.kept and set(ours.scores) == set(every.scores)


def test_what_stays_has_no_part_in_how_far_the_way_has_come() -> None:
    """A quadratic metric along one direction, of which two edges stay: estimates are exact, theirs too."""
    carried = np.array([0.3, 0.8, -0.1, 0.4, 0.9, 0.2])
    goes = np.array([True, False, True, True, False, True])
    before = np.cumsum(np.where(goes, carried, 0)) - np.where(goes, carried, 0)
    exact = carried * (2 + 3 * before) + 1.5 * carried**2  # m(x) = 2 x + 1.5 x^2 of how far it has come
    ends = [carried * (2 + 3 * at) for at in (0.0, carried[goes].sum())]
    way = Way((Point(0, ends[0]), Point(6, ends[1])), ~goes)
    np.testing.assert_allclose(way.estimates().scores, exact, atol=1e-12)


def test_slopes_are_measured_more_closely_where_they_move() -> None:
    rule = IntervalRule(turn=1.0, few=2)
    start, end = np.zeros(20), np.zeros(20)
    end[10:] = 0.35
    way = Way((Point(0, start), Point(20, end)), np.zeros(20, dtype=bool))
    gaps = way.gaps(rule, threshold=1.0)
    assert len(gaps) == 3 and min(gaps) >= 10
    assert way.gaps(rule, threshold=10.0) == []
    none = np.zeros(20, dtype=bool)
    stops = way.stops(0, none, none, none, rule, threshold=1.0)
    assert [stop.place for stop in stops] == [5, 10, 13, 16, 19, 20] and not any(s.is_test for s in stops)


def test_a_heavy_edges_slope_that_moves_further_on_is_stirred_too() -> None:
    """Between the first two points it does not move, while the others do: it may have gone there and back."""
    sizes, slopes = np.ones(20), np.zeros((3, 20))
    sizes[2] = 4.0
    slopes[1, 5:10] = 0.5
    slopes[2, 2] = 0.3
    way = Way(tuple(map(Point, (0, 10, 20), slopes)), np.zeros(20, dtype=bool))
    assert np.flatnonzero(way.heavy(sizes, IntervalRule(), threshold=1.0)).tolist() == [2]
    assert not way.heavy(np.ones(20), IntervalRule(heavy=0.11), threshold=1.0).any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slopes_that_turn_there_and_back_are_foretold_from_where_they_turn(sign: float) -> None:
    """A quadratic metric along one direction: two edges undo each other where slopes are 0 at both ends.

    Further on slopes turn, and tell what each of the two carries along that direction.
    """
    carried = np.zeros(20)
    carried[[3, 6]], carried[10:] = (0.5, -0.5), 0.04
    at = np.cumsum(carried) - carried
    exact = sign * (carried * at + carried**2 / 2)
    points = tuple(Point(k, sign * carried * carried[:k].sum()) for k in (0, 10, 20))
    none = np.zeros(20, dtype=bool)
    found = Way(points, none).estimates()
    assert np.all(found.scores[:10] == 0)  # what both ends say
    np.testing.assert_allclose((found.scores + found.swings)[[3, 6]], exact[[3, 6]], atol=1e-12)
    np.testing.assert_allclose(found.scores[10:], exact[10:], atol=1e-12)
    assert np.all(np.abs(found.swings[10:]) < 1e-12)
    assert np.all(found.furthest >= np.abs(exact) - 1e-12) and found.highest[3 if sign > 0 else 6] > 0.12
    stops = Way(points, none).stops(0, none, none, none, IntervalRule(few=2, apart=1), threshold=0.1)
    assert [stop.place for stop in stops][:2] == [4, 7]  # after each of the two


@pytest.mark.parametrize("carried", [1.0, 0.1])
def test_an_edge_that_carries_much_is_tested_sooner(carried: float) -> None:
    """By its slopes either adds a third of a threshold; one adds more than that, the other as much less."""
    engines = [Saturating(np.zeros((1, EDGES)), np.zeros(EDGES), bend=0.0) for _ in range(2)]
    for engine in engines:
        engine.carried = np.full((1, EDGES), 1e-6)
        for edge, unseen in ((44, 0.08), (40, -0.08)):
            engine.carried[0, edge] *= carried * 3
            engine.slopes_there[edge] = 0.035
            engine.unseen[edge] = unseen
    every = decided(ReaderSearch, engines[0], 0.0, absolute=False)
    ours = decided(IntervalSearch, engines[1], 0.0, absolute=False)
    assert every.kept == (44,)
    if carried > 1 / 3:
        assert ours.kept == every.kept and not {40, 44} & set(ours.estimated)
    else:  # believed of edges that carry little: this is what the audit is for
        assert ours.kept == () and {40, 44} <= set(ours.estimated)


def test_of_some_edges_there_is_one_between_two_measured_circuits() -> None:
    rule = IntervalRule(apart=1, few=2)
    way = Way((Point(0, np.zeros(20)), Point(20, np.zeros(20))), np.zeros(20, dtype=bool))
    alone, none = np.zeros(20, dtype=bool), np.zeros(20, dtype=bool)
    alone[[3, 9, 10, 17]] = True
    tested = none.copy()
    tested[13] = True
    assert [stop.place for stop in way.stops(0, none, none, none, rule, 1.0)] == [20]
    stops = way.stops(0, tested, alone, none, rule, 1.0)
    assert [(stop.place, stop.is_test) for stop in stops] == [
        (9, False),
        (10, False),
        (13, True),
        (20, False),
    ]
