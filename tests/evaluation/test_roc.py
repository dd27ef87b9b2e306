"""ROC of edges and nodes against a reference, by hand, by brute force and by invariants."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pahq_hf import Circuit
from pahq_hf.circuit.graph import BoolArray, Graph, GraphSpec
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.roc import Roc, edge_roc, node_roc, node_scores, nodes_of, precision_recall

GRAPH = Graph(GraphSpec(layers=2, heads=2, kv_groups=1))
EDGES = [tuple(pair) for pair in np.argwhere(GRAPH.all_edges)]


def some(*numbers: int) -> BoolArray:
    """An edge set by number."""
    kept = GRAPH.no_edges()
    for number in numbers:
        kept[EDGES[number]] = True
    return kept


def random_set(rng: np.random.Generator) -> BoolArray:
    """Some edges, neither none nor all."""
    kept = GRAPH.all_edges & (rng.random(GRAPH.all_edges.shape) < rng.uniform(0.1, 0.9))
    kept[EDGES[0]], kept[EDGES[1]] = True, False
    return kept


def test_areas_of_points_by_hand() -> None:
    roc = Roc((0.0, 0.25, 1.0), (0.0, 0.5, 1.0))
    assert roc.auc("step") == pytest.approx(0.75 * 0.5)
    assert roc.auc("trapezoid") == pytest.approx(0.25 * 0.25 + 0.75 * 0.75)
    diagonal = Roc((0.0, 0.5, 1.0), (0.0, 0.5, 1.0))  # values of the ACDC code's own assertions
    assert (diagonal.auc("step"), diagonal.auc("trapezoid")) == (0.25, 0.5)
    assert Roc((0.0, 1.0), (0.0, 1.0)).auc("step") == 0
    with pytest.raises(ConfigError, match="rule"):
        roc.auc("simpson")  # type: ignore[arg-type]


def test_scores_by_hand_with_a_tie() -> None:
    scores = np.zeros(GRAPH.all_edges.shape)
    scores[EDGES[0]], scores[EDGES[1]], scores[EDGES[2]] = 3.0, 2.0, 2.0
    rest = len(EDGES) - 2
    roc = edge_roc(GRAPH, some(0, 1), scores=scores)
    assert roc.fpr == pytest.approx((0, 0, 1 / rest, 1))
    assert roc.tpr == pytest.approx((0, 0.5, 1, 1))
    assert roc.auc("step") == pytest.approx(1 / rest * 0.5 + (1 - 1 / rest))
    assert roc.auc("trapezoid") == pytest.approx(1 / rest * 0.75 + (1 - 1 / rest))


def test_a_sweep_by_hand_drops_beaten_points() -> None:
    rest = len(EDGES) - 2
    circuits = [some(0), some(0, 1, 5), some(1, 6, 7, 8)]  # the last has fewer hits than the one before
    roc = edge_roc(GRAPH, some(0, 1), circuits=circuits)
    assert roc.fpr == pytest.approx((0, 0, 1 / rest, 1))
    assert roc.tpr == pytest.approx((0, 0.5, 1, 1))


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_from_scores_equals_counting_pairs(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_set(rng)
    scores = rng.integers(-levels, levels + 1, GRAPH.all_edges.shape).astype(float)
    right, wrong = scores[truth], scores[GRAPH.all_edges & ~truth]
    pairs = np.mean([(a > b) + 0.5 * (a == b) for a, b in product(right, wrong)])
    surely = np.mean([a > b for a, b in product(right, wrong)])
    roc = edge_roc(GRAPH, truth, scores=scores)
    assert roc.auc("trapezoid") == pytest.approx(pairs)
    assert roc.auc("step") == pytest.approx(surely)  # pessimistic: a tie counts as a loss


@given(st.integers(0, 2**32 - 1), st.sampled_from([edge_roc, node_roc]), st.booleans())
def test_curves_rise_and_step_is_the_lower_rule(seed: int, roc_of: object, sweep: bool) -> None:
    rng = np.random.default_rng(seed)
    truth = some(*rng.choice(12, 3, replace=False))  # few enough to leave a node out
    if sweep:
        roc = roc_of(GRAPH, truth, circuits=[random_set(rng) for _ in range(4)])  # type: ignore[operator]
    else:
        roc = roc_of(GRAPH, truth, scores=rng.integers(-3, 4, GRAPH.all_edges.shape))  # type: ignore[operator]
    assert (roc.fpr[0], roc.tpr[0], roc.fpr[-1], roc.tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(roc.fpr) >= 0).all() and (np.diff(roc.tpr) >= 0).all()
    assert 0 <= roc.auc("step") <= roc.auc("trapezoid") <= 1


@given(st.integers(0, 2**32 - 1))
def test_the_thresholds_of_scores_are_a_sweep(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = some(0, 3, 5)
    scores = rng.integers(-3, 4, GRAPH.all_edges.shape).astype(float)
    circuits = [GRAPH.all_edges & (scores >= level) for level in range(-3, 4)]
    for roc_of in (edge_roc, node_roc):
        by_scores, by_circuits = (
            roc_of(GRAPH, truth, scores=scores),
            roc_of(GRAPH, truth, circuits=circuits),
        )
        for rule in ("step", "trapezoid"):
            assert by_scores.auc(rule) == pytest.approx(by_circuits.auc(rule))


@given(st.integers(0, 2**32 - 1))
def test_perfect_scores_give_one_and_their_opposite_none(seed: int) -> None:
    truth = random_set(np.random.default_rng(seed))
    for rule in ("step", "trapezoid"):
        assert edge_roc(GRAPH, truth, scores=truth.astype(float)).auc(rule) == 1
        assert edge_roc(GRAPH, truth, scores=-truth.astype(float)).auc(rule) == 0
        assert edge_roc(GRAPH, truth, circuits=[truth]).auc(rule) == 1


def test_random_rankings_score_a_half() -> None:
    graph = Graph(GraphSpec(layers=4, heads=6, kv_groups=6))
    rng = np.random.default_rng(0)
    truth = graph.all_edges & (rng.random(graph.all_edges.shape) < 0.05)
    found = [edge_roc(graph, truth, scores=rng.random(graph.all_edges.shape)) for _ in range(30)]
    assert np.mean([roc.auc("trapezoid") for roc in found]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([roc.auc("step") for roc in found]) == pytest.approx(0.5, abs=0.03)


@given(st.integers(0, 2**32 - 1))
def test_nodes_are_those_of_a_circuit(seed: int) -> None:
    kept = random_set(np.random.default_rng(seed))
    names = [writer.name for writer in GRAPH.writers] + ["logits"]
    inside = nodes_of(GRAPH, kept)
    circuit = Circuit(GRAPH, kept, np.zeros(kept.shape), kept)
    assert [name for name, there in zip(names, inside, strict=True) if there] == circuit.nodes


def test_a_node_scores_as_its_best_edge() -> None:
    scores = np.full(GRAPH.all_edges.shape, -1.0)
    best = GRAPH.parse_edge("input->a1.kv0<k>")
    scores[best] = 4.0
    scores[GRAPH.parse_edge("a0.h1->logits")] = 2.0
    names = [writer.name for writer in GRAPH.writers] + ["logits"]
    found = dict(zip(names, node_scores(GRAPH, scores), strict=True))
    assert found == {
        "input": 4.0,
        "a0.h0": -1.0,
        "a0.h1": 2.0,
        "m0": -1.0,
        "a1.h0": 4.0,  # a shared key reader belongs to both heads
        "a1.h1": 4.0,
        "m1": -1.0,
        "logits": 2.0,
    }


def test_precision_and_recall() -> None:
    truth, found = np.array([1, 1, 1, 0, 0], dtype=bool), np.array([1, 0, 0, 1, 0], dtype=bool)
    assert precision_recall(truth, found) == {"precision": 0.5, "recall": pytest.approx(1 / 3)}
    nothing = np.zeros(5, dtype=bool)
    assert precision_recall(truth, nothing) == {"precision": None, "recall": 0.0}
    assert precision_recall(nothing, found) == {"precision": 0.0, "recall": None}


def test_what_makes_no_roc_is_refused() -> None:
    scores = np.zeros(GRAPH.all_edges.shape)
    for arguments in ({}, {"scores": scores, "circuits": [some(1)]}):
        with pytest.raises(ConfigError, match="either"):
            edge_roc(GRAPH, some(0), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none"):
        edge_roc(GRAPH, GRAPH.no_edges(), scores=scores)
    with pytest.raises(ConfigError, match="every one"):
        node_roc(GRAPH, GRAPH.all_edges, scores=scores)
    with pytest.raises(ConfigError, match="NaN"):
        edge_roc(GRAPH, some(0), scores=np.where(GRAPH.all_edges, np.nan, 0.0))
    with pytest.raises(ConfigError, match="shape"):
        node_roc(GRAPH, some(0), circuits=[np.zeros((1, 1), dtype=bool)])
