"""CPR, CMD and rankings, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pahq_hf.circuit.graph import BoolArray, Graph, GraphSpec
from pahq_hf.errors import ConfigError, MetricError
from pahq_hf.evaluation.curves import MIB_FRACTIONS, Curve, faithfulness_curve, rank_edges

GRAPH = Graph(GraphSpec(layers=2, heads=2, kv_groups=2))  # 7 writers, 15 readers


class Linear:
    """A model whose faithfulness is the kept share of some weights."""

    def __init__(self, graph: Graph, weights: np.ndarray) -> None:
        self.graph, self.full, self.empty = graph, 0.0, 3.0
        self.weights = np.where(graph.all_edges, weights, 0.0)
        self.asked: list[int] = []

    def metric_of(self, kept: BoolArray) -> float:
        self.asked.append(int(kept.sum()))
        return 3.0 - 3.0 * float(self.weights[kept].sum() / self.weights.sum())


def test_areas_by_hand() -> None:
    curve = Curve((0.0, 0.25, 1.0), (0, 1, 4), (0.0, 1.2, 1.0))
    assert curve.cpr == pytest.approx(0.25 * 0.6 + 0.75 * 1.1)
    assert curve.cmd == pytest.approx(0.25 * 0.6 + 0.75 * 0.1)
    assert curve.to_dict()["cpr"] == curve.cpr


def test_logarithmic_areas_by_hand() -> None:
    """Each factor of size counts alike; nothing is said of no edges at all."""
    curve = Curve((0.0, 0.01, 0.1, 1.0), (0, 1, 10, 100), (9.0, 0.2, 1.4, 1.0))
    assert curve.cpr_log == pytest.approx(((0.2 + 1.4) / 2 + (1.4 + 1.0) / 2) / 2)
    assert curve.cmd_log == pytest.approx(((0.8 + 0.4) / 2 + (0.4 + 0.0) / 2) / 2)
    assert curve.to_dict()["cmd_log"] == curve.cmd_log
    assert np.isnan(Curve((0.0, 1.0), (0, 4), (0.0, 1.0)).cmd_log)


def test_the_whole_model_at_every_size_has_the_width_of_the_grid() -> None:
    curve = Curve(MIB_FRACTIONS, (1,) * 10, (1.0,) * 10)
    assert curve.cpr == pytest.approx(0.999) and curve.cpr_log == pytest.approx(1)
    assert curve.cmd == curve.cmd_log == 0


def test_mib_grid_by_hand() -> None:
    f = (0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.8, 1.1, 1.2, 1.0)
    by_hand = sum(
        width * (a + b) / 2
        for width, a, b in zip(
            (0.001, 0.003, 0.005, 0.01, 0.03, 0.05, 0.1, 0.3, 0.5), f[:-1], f[1:], strict=True
        )
    )
    assert Curve(MIB_FRACTIONS, (0,) * 10, f).cpr == pytest.approx(by_hand)


def test_ranking_by_sign_size_and_membership() -> None:
    scores = np.zeros(GRAPH.all_edges.shape)
    scores[2, 0], scores[7, 1], scores[14, 6], scores[8, 2] = -5.0, 1.0, 3.0, 0.5
    signed = [tuple(pair) for pair in rank_edges(GRAPH, scores)]
    assert signed[:3] == [(14, 6), (7, 1), (8, 2)]
    assert signed[-1] == (2, 0)
    assert signed[3:-1] == sorted(signed[3:-1])  # ties in model order
    absolute = [tuple(pair) for pair in rank_edges(GRAPH, scores, absolute=True)]
    assert absolute[:3] == [(2, 0), (14, 6), (7, 1)]
    first = GRAPH.no_edges()
    first[8, 2] = first[2, 0] = True
    assert [tuple(p) for p in rank_edges(GRAPH, scores, first=first)][:4] == [(8, 2), (2, 0), (14, 6), (7, 1)]


def test_a_ranking_refuses_other_shapes_and_nan() -> None:
    with pytest.raises(ConfigError, match="shape"):
        rank_edges(GRAPH, np.zeros((2, 2)))
    with pytest.raises(ConfigError, match="NaN"):
        rank_edges(GRAPH, np.where(GRAPH.all_edges, np.nan, 0.0))
    rank_edges(GRAPH, np.where(GRAPH.all_edges, 0.0, np.nan))  # what is no edge does not matter


@given(st.integers(0, 2**32 - 1))
def test_a_ranking_names_every_edge_once(seed: int) -> None:
    scores = np.random.default_rng(seed).integers(-2, 3, GRAPH.all_edges.shape).astype(float)
    pairs = rank_edges(GRAPH, scores)
    assert len({tuple(p) for p in pairs}) == GRAPH.edge_count
    assert GRAPH.all_edges[pairs[:, 0], pairs[:, 1]].all()
    assert (np.diff(scores[pairs[:, 0], pairs[:, 1]]) <= 0).all()


def test_edge_counts_are_rounded_down_and_ends_are_known() -> None:
    judge = Linear(GRAPH, np.ones(GRAPH.all_edges.shape))
    curve = faithfulness_curve(judge, rank_edges(GRAPH, np.zeros(GRAPH.all_edges.shape)))
    assert curve.edges == tuple(int(f * GRAPH.edge_count) for f in MIB_FRACTIONS)
    assert curve.edges[0] == 0 and curve.faithfulness[0] == 0.0
    assert curve.edges[-1] == GRAPH.edge_count and curve.faithfulness[-1] == 1.0
    assert judge.asked == sorted({n for n in curve.edges if 0 < n < GRAPH.edge_count})


def test_random_rankings_of_a_linear_model_lie_on_the_diagonal() -> None:
    graph = Graph(GraphSpec(layers=4, heads=6, kv_groups=6))
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(30):
        judge = Linear(graph, rng.random(graph.all_edges.shape))
        areas.append(faithfulness_curve(judge, rank_edges(graph, rng.random(graph.all_edges.shape))).cpr)
    assert np.mean(areas) == pytest.approx((1 - 0.001**2) / 2, abs=0.01)


def test_the_best_ranking_beats_random_and_the_worst() -> None:
    rng = np.random.default_rng(1)
    weights = rng.exponential(size=GRAPH.all_edges.shape)
    judge = Linear(GRAPH, weights)
    best, worst = (faithfulness_curve(judge, rank_edges(GRAPH, sign * weights)) for sign in (1, -1))
    assert best.cpr > 0.55 > 0.45 > worst.cpr
    assert best.cpr + best.cmd == pytest.approx(0.999)  # f stays below 1 here


@pytest.mark.parametrize("fractions", [(), (0.5, 0.1), (0.1, 0.1), (-0.1, 1), (0.5, 1.5), (float("nan"),)])
def test_nonsense_fractions_are_refused(fractions: tuple[float, ...]) -> None:
    judge = Linear(GRAPH, np.ones(GRAPH.all_edges.shape))
    with pytest.raises(ConfigError, match="fractions"):
        faithfulness_curve(judge, rank_edges(GRAPH, np.zeros(GRAPH.all_edges.shape)), fractions)


def test_a_ranking_that_misses_edges_is_refused() -> None:
    judge = Linear(GRAPH, np.ones(GRAPH.all_edges.shape))
    pairs = rank_edges(GRAPH, np.zeros(GRAPH.all_edges.shape))
    for wrong in (pairs[1:], np.concatenate([pairs[1:], pairs[1:2]])):
        with pytest.raises(ConfigError, match="once"):
            faithfulness_curve(judge, wrong)


def test_no_faithfulness_without_a_difference() -> None:
    judge = Linear(GRAPH, np.ones(GRAPH.all_edges.shape))
    judge.full = judge.empty
    with pytest.raises(MetricError, match="undefined"):
        faithfulness_curve(judge, rank_edges(GRAPH, np.zeros(GRAPH.all_edges.shape)))
