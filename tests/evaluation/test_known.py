"""Models with a known circuit: the truth is the circuit, and nothing else matters."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from benchmarks import known_circuits
from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.capture.recording import capture
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.evaluation.ground_truth.hand_built import KNOWN_MODELS, KnownModel, load_known_model
from pahq_hf.evaluation.roc import edge_roc
from tests.tiers import quick

EVERY = pytest.mark.parametrize("name", KNOWN_MODELS)
FP32 = PAHQConfig(regime="fp32")


@lru_cache
def judge(name: str) -> tuple[KnownModel, PAHQModel, Evaluator]:
    known = load_known_model(name, n=16)
    model = PAHQModel(known.model, FP32)
    return known, model, Evaluator(model.patched, known.task, "logit_diff", "corrupted")


@EVERY
def test_does_its_task(name: str) -> None:
    known, model, evaluator = judge(name)
    whole = model.evaluate(model.attribute(known.task, method="random"), known.task)
    assert whole["accuracy"] == 1
    assert evaluator.empty - evaluator.full > 2


@EVERY
def test_truth_is_enough(name: str) -> None:
    known, _, evaluator = judge(name)
    assert evaluator.metric_of(known.truth) == pytest.approx(evaluator.full, abs=1e-5)
    assert known.truth.sum() == len(known.edges) < known.graph.edge_count / 10
    assert (known.graph.live_edges(known.truth) == known.truth).all()


@EVERY
def test_every_edge_is_needed_but_redundant_ones(name: str) -> None:
    known, _, evaluator = judge(name)
    for edge in known.edges:
        kept = known.graph.all_edges.copy()
        kept[known.graph.parse_edge(edge)] = False
        effect = evaluator.metric_of(kept) - evaluator.full
        if edge in known.redundant:
            assert abs(effect) < 1e-5
        else:
            assert effect > 1e-3


@pytest.mark.parametrize("name", quick(KNOWN_MODELS, "xor", "backup"))
def test_no_other_edge_has_an_effect(name: str) -> None:
    known, model, _ = judge(name)
    scores = model.attribute(known.task, method="exact").scores
    assert abs(scores[~known.truth]).max() < 1e-5


def test_both_paths_of_the_backup_are_needed_together() -> None:
    known, _, evaluator = judge("backup")
    for pair in (("a0.h0->m1", "a1.h3->m1"), ("input->a0.h0<v>", "a1.h3->m1")):
        kept = known.graph.all_edges.copy()
        for edge in pair:
            kept[known.graph.parse_edge(edge)] = False
        assert evaluator.metric_of(kept) - evaluator.full > 2


@EVERY
def test_distractors_write_what_differs(name: str) -> None:
    """Every head and MLP outside the circuit, but one head that adds a constant, carries a difference."""
    known, model, _ = judge(name)
    task, patched = known.task, model.patched
    clean, corrupted = (capture(patched, task, ids) for ids in (task.clean_ids, task.corrupted_ids))
    still = [
        f"a{layer}.h{head}"
        for layer, (z, c) in enumerate(zip(clean.z, corrupted.z, strict=True))
        for head in range(known.graph.spec.heads)
        if torch.allclose(z[:, :, head], c[:, :, head], atol=1e-5)
    ]
    assert len(still) == 1
    for mlp, other in zip(clean.mlp, corrupted.mlp, strict=True):
        assert not torch.allclose(mlp, other, atol=1e-2)


def test_is_a_plain_gpt2(tmp_path: Path) -> None:
    known = load_known_model("induction", n=4)
    known.model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    expected = known.model(known.task.clean_ids).logits
    assert (again(known.task.clean_ids).logits == expected).all()


def test_prompts_depend_on_the_seed_and_weights_do_not() -> None:
    one, two = load_known_model("chain", n=4), load_known_model("chain", n=4, seed=1)
    assert one.task.fingerprint() != two.task.fingerprint()
    assert (one.model.lm_head.weight == two.model.lm_head.weight).all()


def test_acdc_finds_one_path_of_an_or() -> None:
    known = load_known_model("backup", n=16)
    circuit = PAHQModel(known.model, FP32).discover(known.task, threshold=0.01, progress=False)
    assert [name for name, _ in circuit.edges] == ["input->a0.h0<v>", "a0.h0->m1", "m1->logits"]


@pytest.mark.parametrize("name", quick(KNOWN_MODELS, "xor", "backup"))
def test_refine_finds_the_circuit_and_no_more(name: str) -> None:
    """Given room for twice as many edges.

    By KL, which sees that either path of an OR does some good, but hardly the quietest voter: 2e-6.
    """
    known = load_known_model(name, n=16)
    model = PAHQModel(known.model, FP32)
    circuit = model.discover(
        known.task,
        search="refine",
        edges=2 * len(known.edges),
        metric="logit_diff" if name == "votes" else "kl",
        steps=0,
        progress=False,
    )
    assert {edge for edge, _ in circuit.edges} == set(known.edges)
    assert edge_roc(known.graph, known.truth, scores=circuit.scores).auc("step") == 1
    assert circuit.verified


@pytest.mark.parametrize("name", quick(KNOWN_MODELS, "chain", "backup"))
def test_both_directions_find_every_path(name: str) -> None:
    """Noising keeps one path of an OR, denoising all; a threshold below what the weakest voter says."""
    known = load_known_model(name, n=16)
    circuit = PAHQModel(known.model, FP32).discover(
        known.task, threshold=0.001, direction="both", progress=False
    )
    assert {edge for edge, _ in circuit.edges} == set(known.edges)
    alone = {edge for edge, gate in circuit.gates.items() if gate != "ADDER"}
    assert alone == ({"input->a1.h3<v>", "a1.h3->m1"} if name == "backup" else set())
    assert {circuit.gates[edge] for edge in alone} <= {"OR"}


@pytest.mark.parametrize("name", quick(KNOWN_MODELS, "backup"))
def test_refine_in_both_directions_finds_every_path(name: str) -> None:
    """By logit_diff, which one path of the OR carries whole: noising alone has no use for the other."""
    known = load_known_model(name, n=16)
    model = PAHQModel(known.model, FP32)
    asked: dict[str, Any] = {"search": "refine", "edges": 2 * len(known.edges), "steps": 0, "progress": False}
    both = model.discover(known.task, direction="both", **asked)
    assert {edge for edge, _ in both.edges} == set(known.edges)
    assert both.verified and both.record.swapped.faithfulness == pytest.approx(1, abs=1e-4)
    noising = {edge for edge, gate in both.gates.items() if gate != "OR"}
    assert len(noising) == (3 if name == "backup" else len(known.edges))


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="known: induction"):
        load_known_model("sonnet")
    with pytest.raises(ConfigError, match="at least 1"):
        load_known_model("xor", n=0)


@pytest.mark.exhaustive
def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "known.json"
    rows = "acdc,both,eap-ig,exact,random"
    options = ["--rows", rows, "--thresholds", "0.01,0.3", "--n", "8", "--seeds", "2", "--json", str(file)]
    assert known_circuits.main(["--models", "induction,backup", *options]) == 0
    assert "backup" in capsys.readouterr().out
    scores = {(s["model"], s["method"]): s for s in json.loads(file.read_text())["scores"]}
    assert len(scores) == 10
    for method in ("acdc", "eap-ig", "exact"):
        assert scores["induction", method]["edge_step"] == 1
    assert scores["backup", "acdc"]["best"] == pytest.approx(3 / 5)
    assert scores["backup", "both"]["best"] == 1
    for score in scores.values():
        assert 0 <= score["edge_step"] <= score["edge_trapezoid"] <= 1


def test_benchmark_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert known_circuits.main(["--rows", "acdc:fp64"]) == 2
    assert "unknown regime" in capsys.readouterr().err
