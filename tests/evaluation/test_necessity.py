"""Minimality and completeness against whole forward passes, edge by edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.circuit.graph import BoolArray, edge_list
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.evaluation.necessity import Minimality, completeness, minimality
from tests.helpers import FP32, random_edges, wrapped
from tests.models import random_task

TASK = random_task(batch=3, seed=7, padding="left")


def one_by_one(model: PAHQModel, kept: BoolArray, engine: HooksEngine) -> np.ndarray:
    """Drop-one effects by whole forward passes."""
    effects = np.zeros(kept.shape)
    before = engine.metric_of(kept)
    for edge in edge_list(kept):
        without = kept.copy()
        without[edge] = False
        effects[edge] = engine.metric_of(without) - before
    return effects


@pytest.mark.parametrize(
    ("name", "metric", "ablation", "share"),
    [
        ("gpt2", "kl", "corrupted", 0.5),
        ("llama", "logit_diff", "corrupted", 0.7),
        ("llama_split", "kl", "mean", 0.4),
        ("mistral_window", "nll", "zero", 0.6),
        ("gpt_neox", "kl", "corrupted", 0.6),  # parallel blocks
        ("gemma2", "kl", "corrupted", 0.5),  # a norm couples the heads
        ("olmo2", "prob_diff", "mean", 0.7),  # so do norms of queries and keys
    ],
)
def test_drop_effects_equal_whole_passes(name: str, metric: str, ablation: str, share: float) -> None:
    model = wrapped(name, dtype=torch.float64)
    kept = random_edges(model.graph, share, seed=3)
    evaluator = Evaluator(model.patched, TASK, metric, ablation)  # type: ignore[arg-type]
    engine = HooksEngine(model.patched, TASK, metric, ablation=ablation)  # type: ignore[arg-type]
    expected = one_by_one(model, kept, engine)
    assert np.abs(expected).max() > 1e-3
    assert evaluator.drop_effects(kept) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_drop_effects_of_sparse_full_and_empty_circuits(share: float) -> None:
    model = wrapped("qwen2", dtype=torch.float64)
    kept = random_edges(model.graph, share, seed=1)
    engine = HooksEngine(model.patched, TASK, "kl")
    ours = Evaluator(model.patched, TASK, "kl", "corrupted").drop_effects(kept)
    assert ours == pytest.approx(one_by_one(model, kept, engine), abs=1e-10)


def test_low_precision_models_are_judged_in_fp32() -> None:
    kept = random_edges(wrapped("llama").graph, 0.5, seed=2)
    low = wrapped("llama", regime="pahq")
    ours = Evaluator(low.patched, TASK, "kl", "corrupted").drop_effects(kept)
    exact = Evaluator(wrapped("llama").patched, TASK, "kl", "corrupted").drop_effects(kept)
    assert ours == pytest.approx(exact, abs=1e-5)
    assert low.patched.precision.active == frozenset()


def test_the_fallback_agrees() -> None:
    model = wrapped("llama")
    evaluator = Evaluator(model.patched, TASK, "kl", "corrupted")
    kept = random_edges(model.graph, 0.5, seed=4)
    assert evaluator.drop_effects(kept) == pytest.approx(evaluator._engine.drop_each(kept), abs=1e-5)


def test_minimality_by_hand() -> None:
    graph = wrapped("llama").graph
    kept, effects = graph.no_edges(), np.zeros(graph.all_edges.shape)
    names = ("input->logits", "m0->logits", "input->m0")
    for name, effect in zip(names, (0.5, -0.1, 0.02), strict=True):
        kept[graph.parse_edge(name)], effects[graph.parse_edge(name)] = True, effect
    facts = Minimality(graph, kept, effects, 0.02).to_dict()
    assert facts["largest"] == {"edge": "input->logits", "effect": 0.5}
    assert facts["smallest"] == {"edge": "m0->logits", "effect": -0.1}
    assert facts["could_go"] == 1  # strictly below
    assert facts["effects"] == dict(zip(names, (0.5, -0.1, 0.02), strict=True))
    assert Minimality(graph, kept, effects).could_go is None
    nothing = Minimality(graph, graph.no_edges(), effects, 0.1).to_dict()
    assert nothing["largest"] is None and nothing["could_go"] == 0


def test_completeness_equals_whole_passes() -> None:
    model = wrapped("gpt2")
    kept = random_edges(model.graph, 0.5, seed=5)
    evaluator = Evaluator(model.patched, TASK, "logit_diff", "corrupted")
    engine = HooksEngine(model.patched, TASK, "logit_diff")
    found = completeness(evaluator, kept, samples=3, seed=9)
    everything, rng = model.graph.all_edges, np.random.default_rng(9)
    gaps = []
    for _ in range(3):
        k = kept & (rng.random(kept.shape) < 0.5)
        gaps.append(abs(engine.metric_of(kept & ~k) - engine.metric_of(everything & ~k)))
    assert (found.mean, found.max) == (
        pytest.approx(np.mean(gaps), abs=1e-6),
        pytest.approx(max(gaps), abs=1e-6),
    )
    full, empty = engine.metric_of(everything), engine.metric_of(model.graph.no_edges())
    outside = engine.metric_of(everything & ~kept)
    assert found.complement_faithfulness == pytest.approx((outside - empty) / (full - empty), abs=1e-5)
    assert completeness(evaluator, kept, 3, 9) == found
    assert completeness(evaluator, kept, 3, 8).mean != found.mean


def test_the_whole_model_is_complete_and_its_complement_empty() -> None:
    model = wrapped("gpt2")
    evaluator = Evaluator(model.patched, TASK, "kl", "corrupted")
    found = completeness(evaluator, model.graph.all_edges, samples=2)
    assert (found.mean, found.max) == (0, 0)
    assert found.complement_faithfulness == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match="negative"):
        completeness(evaluator, model.graph.all_edges, samples=-1)


def test_on_the_demo_checkpoint() -> None:
    model = PAHQModel.from_pretrained("demo", FP32)
    task = load_task("ioi", model.tokenizer, n=4)
    evaluator = Evaluator(model.patched, task, "logit_diff", "corrupted")
    kept = random_edges(model.graph, 0.15, seed=0)
    found = minimality(evaluator, kept)
    engine = HooksEngine(model.patched, task, "logit_diff")
    assert found.effects == pytest.approx(one_by_one(model, kept, engine), abs=1e-5)


def test_options_of_the_model() -> None:
    model = wrapped("llama")
    kept = random_edges(model.graph, 0.5, seed=6)
    scores = np.where(model.graph.all_edges, np.random.default_rng(0).normal(size=kept.shape), 0.0)
    run = {"arguments": {"threshold": 0.05, "metric": "kl"}, "metric": {"name": "kl"}}
    circuit = Circuit(model.graph, kept, scores, model.graph.all_edges, {}, run)
    facts = model.evaluate(
        circuit, TASK, curve=True, minimality=True, completeness=True, samples=1, reference=circuit
    )
    assert facts["sparsity"] == pytest.approx(1 - kept.sum() / model.graph.edge_count)
    assert facts["minimality"]["threshold"] == 0.05
    assert len(facts["minimality"]["effects"]) == kept.sum()
    assert facts["completeness"]["samples"] == 1
    # kept edges come first, so against itself an ACDC circuit scores 1 whatever its scores are
    assert facts["reference"]["edges"]["roc"]["auc"] == {"step": 1, "trapezoid": 1}
    assert facts["reference"]["edges"]["precision"] == facts["reference"]["edges"]["recall"] == 1
    assert "first" in facts["curve"]["ranking"]
    circuit.discovery["method"] = "eap"
    other = model.evaluate(circuit, TASK, curve=True, reference=circuit, metric="logit_diff", minimality=True)
    assert other["reference"]["edges"]["roc"]["auc"]["trapezoid"] < 0.9
    assert other["minimality"]["threshold"] is None  # tau was one of kl
    assert other["curve"]["signed"]["faithfulness"] != facts["curve"]["signed"]["faithfulness"]
    assert other["logit_diff"] == pytest.approx(-other["metric"]["value"])
    with pytest.raises(ConfigError, match="no option 'curves'"):
        model.evaluate(circuit, TASK, curves=True)
