"""Whole runs: what they write, and what is measured of their circuits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pahq_hf.search.bench
from pahq_hf import ACDCConfig, Circuit, PAHQModel
from pahq_hf.capture.recording import answer_logits
from pahq_hf.circuit.verdict import faithfulness
from pahq_hf.config import EngineConfig
from pahq_hf.errors import ConfigError, MetricError, RunError
from tests.helpers import FILES, FP32, assert_same_circuit, files_of, journal_lines, named, referee, wrapped
from tests.models import FAMILIES
from tests.search.runs import TASK, TAU, discover

# -- what a run writes ----------------------------------------------------------------------------------


def test_files_of_a_run(finished: Path) -> None:
    assert set(files_of(finished)) == FILES
    circuit = Circuit.from_pretrained(finished)
    graph = circuit.graph
    document = json.loads((finished / "circuit.json").read_text())
    assert list(document) == ["cfg", "nodes", "edges"]
    assert document["edges"] == {n: {"score": s, "in_graph": True} for n, s in circuit.edges}
    assert document["nodes"] == {n: {"in_graph": True} for n in circuit.nodes}
    assert document["cfg"]["model_type"] == "llama" and document["cfg"]["d_model"] == 32
    facts = json.loads((finished / "discovery.json").read_text())
    assert {"edges", "evaluations", "seconds", "peak_memory", "metric", "versions", "arguments"} <= set(facts)
    assert {"total", "tested", "untested", "kept"} <= set(facts["edges"])
    assert facts["edges"]["total"] == graph.edge_count == 82
    assert facts["edges"]["tested"] == int(circuit.tested.sum())
    assert facts["edges"]["tested"] + facts["edges"]["untested"] == graph.edge_count
    assert facts["edges"]["kept"] == circuit.edge_count > 0
    assert facts["edges"]["live"] == int(circuit.live.sum())
    assert facts["evaluations"] >= facts["edges"]["tested"] + 1
    assert facts["second_looks"] == {"margin": None, "tests": 0, "changed": 0}
    assert {"name", "full", "empty", "final", "final_recomputed", "tolerance", "fp32"} == set(facts["metric"])
    assert facts["verified"] is True
    seconds = facts["seconds"]
    assert seconds["total"] >= seconds["search"] > 0 and seconds["capture"] > 0
    assert facts["peak_memory"]["rss"] > 10_000_000
    assert all(isinstance(value, int) for value in facts["peak_memory"].values())
    assert facts["arguments"]["threshold"] == TAU and facts["arguments"]["metric"] == "logit_diff"
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["device"] == "cpu"
    assert facts["task"]["examples"] == 3
    lines = journal_lines(finished)
    assert len(lines) == 1 + len(graph.readers)
    assert "tested" in (finished / "README.md").read_text()


def test_a_run_finds_what_the_referee_finds(finished: Path) -> None:
    circuit = Circuit.from_pretrained(finished)
    judge = referee("llama", TASK, metric="logit_diff")
    expected = judge.acdc(TAU)
    assert named(circuit.graph, circuit.kept) == expected.kept
    assert named(circuit.graph, circuit.graph.all_edges & ~circuit.tested) == expected.untested
    for edge, score in expected.scores.items():
        r, w = circuit.graph.parse_edge("->".join(edge))
        assert circuit.scores[r, w] == pytest.approx(score, abs=1e-5)
    metric = circuit.discovery["metric"]
    assert metric["full"] == pytest.approx(judge.metric(set()), abs=1e-5)
    assert metric["empty"] == pytest.approx(judge.metric(judge.edge_set), abs=1e-5)
    for name in ("final", "final_recomputed", "fp32"):
        assert metric[name] == pytest.approx(expected.final, abs=1e-5)


def test_what_is_returned_is_what_is_saved(tmp_path: Path) -> None:
    circuit = discover(wrapped("gpt2"), tmp_path / "out", metric="kl", order="head")
    again = Circuit.from_pretrained(tmp_path / "out")
    assert_same_circuit(again, circuit)
    assert again.discovery == json.loads(json.dumps(circuit.discovery))
    assert again.discovery["metric"]["full"] == pytest.approx(0, abs=1e-9)
    assert circuit.model["base_model"]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    circuit = discover(wrapped("llama"))
    assert circuit.edge_count and not list(tmp_path.iterdir())


@pytest.mark.parametrize("regime", ["fp32", "pahq", "pahq-literal", "rtn"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_quoted_metric_is_that_of_the_circuit_in_fp32(name: str, regime: Any) -> None:
    """Whatever the search saw; and the search in low precision without anchors saw something else."""
    circuit = discover(wrapped(name, regime=regime), metric="kl")
    judge = referee(name, TASK)
    removed = judge.edge_set - named(circuit.graph, circuit.kept)
    metric = circuit.discovery["metric"]
    assert metric["fp32"] == pytest.approx(judge.metric(removed), abs=1e-5)
    assert metric["empty"] == pytest.approx(judge.metric(judge.edge_set), abs=1e-5)
    assert metric["full"] == pytest.approx(0, abs=1e-9)
    gap = abs(metric["final_recomputed"] - metric["fp32"])
    if regime in ("fp32", "pahq"):
        assert metric["final"] == pytest.approx(metric["fp32"], abs=1e-6)
        assert gap < 1e-6
    else:
        assert gap > 1e-4
    if regime == "rtn":
        assert metric["final"] == pytest.approx(metric["final_recomputed"], abs=1e-6)
    precision = circuit.discovery["precision"]
    assert precision["regime"] == regime
    memory = circuit.discovery["peak_memory"]
    low = memory["linear_weights"] < 0.5 * memory["linear_weights_fp32"]
    assert low == (regime != "fp32")


@pytest.mark.parametrize("fmt", ["int8", "bf16"])
def test_other_formats(fmt: Any) -> None:
    circuit = discover(wrapped("llama", regime="rtn", fmt=fmt), metric="kl")
    judge = referee("llama", TASK)
    removed = judge.edge_set - named(circuit.graph, circuit.kept)
    assert circuit.discovery["metric"]["fp32"] == pytest.approx(judge.metric(removed), abs=1e-5)
    assert circuit.discovery["precision"]["format"] == fmt


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_reach_search_and_evaluation(ablation: Any) -> None:
    circuit = discover(wrapped("llama", dtype=torch.float64), ablation=ablation)
    judge = referee("llama", TASK, metric="logit_diff", ablation=ablation)
    expected = judge.acdc(TAU)
    assert named(circuit.graph, circuit.kept) == expected.kept
    assert circuit.discovery["metric"]["fp32"] == pytest.approx(expected.final, abs=1e-9)
    assert circuit.discovery["metric"]["empty"] == pytest.approx(judge.metric(judge.edge_set), abs=1e-9)


def test_a_run_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = wrapped("llama", regime="pahq-literal")
    before = answer_logits(model.patched, TASK, TASK.clean_ids)
    size = model.patched.precision.nbytes
    discover(model)
    assert torch.equal(answer_logits(model.patched, TASK, TASK.clean_ids), before)
    assert model.patched.precision.nbytes == size


def test_options_are_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    monkeypatch.setattr(pahq_hf.search.bench, "make_engine", None)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="threshold must be a finite number >= 0"):
        discover(model, out, threshold=-1)
    with pytest.raises(ConfigError, match="no reader matches"):
        discover(model, out, readers="logits,b*")
    with pytest.raises(ConfigError, match="no option 'tau'"):
        discover(model, out, tau=1)
    with pytest.raises(ConfigError, match="not both"):
        model.discover(TASK, config=ACDCConfig(), threshold=1.0)
    with pytest.raises(MetricError, match="needs an answer"):
        discover(model, out, task=replace(TASK, answers=((),) * 3))
    assert not out.exists()


@pytest.mark.parametrize("regime", ["pahq", "pahq-literal", "rtn"])
def test_the_hooks_engine_decides_the_same_in_low_precision(regime: Any) -> None:
    model = wrapped("llama", regime=regime, compute="fp32")
    sparse, hooks = (discover(model, engine=EngineConfig(engine=name)) for name in ("sparse", "hooks"))
    assert np.array_equal(hooks.kept, sparse.kept)
    assert np.abs(hooks.scores - sparse.scores).max() < 1e-5
    assert hooks.discovery["second_looks"] == sparse.discovery["second_looks"]
    for name in ("final", "final_recomputed", "fp32"):
        ours, theirs = hooks.discovery["metric"][name], sparse.discovery["metric"][name]
        assert ours == pytest.approx(theirs, abs=1e-5)


# -- judging a circuit ------------------------------------------------------------------------------------


def test_faithfulness() -> None:
    assert faithfulness(0.5, 0.0, 2.0) == 0.75
    assert faithfulness(-3.0, -1.0, 1.0) == 2.0  # better than the full model
    assert faithfulness(1.0, 1.0, 1.0) is None


def test_evaluation_takes_the_circuits_own_metric_and_ablation() -> None:
    model = wrapped("llama", dtype=torch.float64)
    circuit = discover(model, metric="prob_diff", ablation="mean")
    facts = model.evaluate(circuit, TASK)
    judge = referee("llama", TASK, metric="prob_diff", ablation="mean")
    removed = judge.edge_set - named(circuit.graph, circuit.kept)
    assert facts["metric"]["name"] == "prob_diff"
    assert facts["metric"]["value"] == pytest.approx(judge.metric(removed), abs=1e-9)
    assert facts["metric"]["empty"] == pytest.approx(judge.metric(judge.edge_set), abs=1e-9)
    full, empty = judge.metric(set()), judge.metric(judge.edge_set)
    assert facts["faithfulness"] == pytest.approx((judge.metric(removed) - empty) / (full - empty), abs=1e-6)
    assert facts["kl"] == pytest.approx(referee("llama", TASK, ablation="mean").metric(removed), abs=1e-9)


def test_an_unknown_ablation_in_a_circuit_file_is_refused() -> None:
    circuit = discover(wrapped("llama"))
    circuit.discovery["arguments"]["ablation"] = "noise"
    with pytest.raises(ConfigError, match=r"ablation must be one of corrupted, .*; got 'noise'"):
        wrapped("llama").evaluate(circuit, TASK)


# -- folders that cannot be written -----------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("below", ["file/out", "file", "x" * 300])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, below: str, resume: bool) -> None:
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(RunError, match="cannot create the output folder"):
        discover(wrapped("llama"), tmp_path / below, resume=resume)
    assert files_of(tmp_path) == {"file": b"a regular file"}


def test_nan_leaves_no_folder(tmp_path: Path) -> None:
    """The poisoned token stands in a prompt of the task, and not in those of the check at load."""
    hf = FAMILIES["llama"]()
    with torch.no_grad():
        hf.get_input_embeddings().weight[int(TASK.clean_ids[0, -1])] = float("nan")
    model = PAHQModel(hf, FP32)
    with pytest.raises(MetricError, match="came out as nan"):
        discover(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
