"""Gradients at a circuit, for all edges at once: against differences, and against gradients at one reader."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pahq_hf import PAHQModel, Task
from pahq_hf.circuit.graph import Graph
from pahq_hf.config import Ablation
from pahq_hf.engine.build import make_gradient_runs
from pahq_hf.engine.hooks import gradient_runs
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import MetricError
from pahq_hf.search.attribution.methods import eap
from pahq_hf.tasks.metrics import MetricSpec, find_metric, known_metrics, register_metric
from tests.engine.soft_circuits import SoftReferee
from tests.engine.test_slopes import LEFT, TASKS, close, engine_of, some_readers
from tests.families import ALL_FAMILIES, IN_FLOAT64
from tests.helpers import ALL_GRAPHS, FP32, random_edges, referee, wrapped
from tests.tiers import quick

pytestmark = pytest.mark.crossing

QUICK_FAMILIES = ("gpt2", "llama", "gemma2", "olmo2", "falcon", "mixtral", "bloom")
Floats = NDArray[np.float64]


def at_circuit(
    model: PAHQModel, metric: str, shares: Floats, task: Task = LEFT, ablation: Ablation = "corrupted"
) -> tuple[float, Floats]:
    """Metric and effects of the whole task."""
    runs = make_gradient_runs(Setting(model.patched, task, metric, ablation, model.pahq_config))
    found = [runs.at_circuit(part, shares) for part in runs.circuit_parts()]
    return sum(value for value, _ in found), np.sum([effects for _, effects in found], axis=0)


def soft(graph: Graph, seed: int, least: float = -0.3) -> Floats:
    """Shares of all edges, of which some are gone and some kept; the lower `least`, the more are gone."""
    drawn = np.random.default_rng(seed).uniform(least, 1.3, graph.all_edges.shape).clip(0, 1)
    shares: Floats = np.where(graph.all_edges, drawn, 0.0)
    return shares


@pytest.mark.parametrize(
    ("metric", "ablation", "padding"),
    [("kl", "corrupted", "left"), ("logit_diff", "zero", "none"), ("nll", "mean", "right")],
)
@pytest.mark.parametrize("name", quick(ALL_GRAPHS, "gpt2", "llama", "llama_split", "gemma2", "falcon"))
def test_effects_are_what_a_little_less_of_an_edge_does(
    name: str, metric: str, ablation: Any, padding: str
) -> None:
    """Of edges drawn from all, at a soft circuit: kept, gone, and between."""
    check_effects(name, metric, ablation, padding, least=-0.3)


@pytest.mark.parametrize("name", quick(ALL_GRAPHS, "llama"))
def test_so_they_are_where_hardly_an_edge_is_left(name: str) -> None:
    """Many nodes are not read then, or what reads them does not reach the output."""
    check_effects(name, "logit_diff", "corrupted", "left", least=-3.0)


def check_effects(name: str, metric: str, ablation: Any, padding: str, least: float) -> None:
    model, task = wrapped(name, dtype=torch.float64), TASKS[padding]
    graph = model.patched.graph
    judge = SoftReferee(referee(name, task, metric=metric, ablation=ablation), graph)
    shares = soft(graph, 3, least)
    value, effects = at_circuit(model, metric, shares, task, ablation)
    # All are edges to the referee, which knows no others.
    assert value == pytest.approx(judge(np.where(graph.all_edges, shares, 1.0)), abs=1e-7)
    edges = np.argwhere(graph.all_edges)
    some = edges[np.random.default_rng(4).permutation(len(edges))[:25]]
    expected = []
    for r, w in some:
        ends = []
        for step in (1e-6, -1e-6):
            moved = np.where(graph.all_edges, shares, 1.0)
            moved[r, w] -= step
            ends.append(judge(moved))
        expected.append((ends[0] - ends[1]) / 2e-6)
    assert np.abs(expected).max() > 1e-4
    close(effects[tuple(some.T)], np.array(expected), 1e-5)
    assert not effects[~graph.all_edges].any()


@pytest.mark.parametrize("family", quick(IN_FLOAT64, *QUICK_FAMILIES))
def test_every_family_has_them(family: str) -> None:
    """They are those that the engine finds reader by reader."""
    model = PAHQModel(ALL_FAMILIES[family](dtype=torch.float64), FP32)
    engine = engine_of("hooks", model, "logit_diff")
    graph = engine.graph
    kept = random_edges(graph, 0.6, seed=2)
    value, effects = at_circuit(model, "logit_diff", kept.astype(float))
    assert value == pytest.approx(engine.begin(kept), abs=1e-5)
    for reader in some_readers(graph):
        writers = list(graph.in_edges(reader))
        gone = [writer for writer in writers if not kept[reader, writer]]
        ours = engine.slopes(reader, [gone], writers).effects[0]
        close(effects[reader, writers], ours, 1e-5)


@pytest.mark.parametrize("regime", ["fp32", "pahq", "rtn", "pahq-literal"])
def test_at_the_full_model_they_are_those_of_attribution(regime: Any) -> None:
    model = wrapped("llama", regime=regime)
    runs = make_gradient_runs(Setting(model.patched, LEFT, "logit_diff", "corrupted", model.pahq_config))
    _, effects = at_circuit(model, "logit_diff", runs.graph.all_edges.astype(float))
    # What low weights make of each head's share of the stream is not what they make of the stream.
    close(effects, eap(runs), 1e-4 if regime == "fp32" else 0.2)


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("gpt2", dtype=torch.float64)
    shares = soft(model.patched.graph, seed=1)
    value, effects = at_circuit(model, "kl", shares)
    monkeypatch.setattr(gradient_runs, "_CIRCUIT_BYTES", 1)
    one_by_one = at_circuit(model, "kl", shares)
    assert one_by_one[0] == pytest.approx(value, rel=1e-9)
    close(one_by_one[1], effects, 1e-9)


@pytest.mark.parametrize("name", quick(["gpt2", "llama", "gemma2"], "gpt2", "gemma2"))
def test_each_example_may_have_a_circuit_of_its_own(name: str) -> None:
    model = wrapped(name, dtype=torch.float64)
    setting = Setting(model.patched, LEFT, "kl", "corrupted", model.pahq_config)
    runs = make_gradient_runs(setting)
    shares = np.stack([soft(runs.graph, seed) for seed in range(len(LEFT))])
    (together,) = runs.circuit_parts()
    value, effects = runs.at_circuit(together, shares)
    found = [runs.at_circuit(part, shares[k]) for k, part in enumerate(runs.circuit_parts(most=1))]
    assert value == pytest.approx(sum(alone for alone, _ in found), rel=1e-9)
    assert effects.shape == shares.shape
    close(effects, np.stack([alone for _, alone in found]), 1e-9)


def test_a_metric_without_a_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name: find_metric(name) for name in known_metrics()}
    monkeypatch.setattr("pahq_hf.tasks.metrics._METRICS", names)  # what is registered ends with the test
    spec = MetricSpec("stepped", lambda logits, targets: logits.argmax(-1).double(), differentiable=False)
    register_metric(spec)
    model = wrapped("gpt2")
    with pytest.raises(MetricError, match="no gradient"):
        at_circuit(model, "stepped", soft(model.patched.graph, seed=1))
