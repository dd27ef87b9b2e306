"""Whole nodes as units: `level="node"`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pahq_hf import Circuit, PAHQModel
from pahq_hf.circuit.card import render_card
from pahq_hf.circuit.interchange import to_mib
from pahq_hf.circuit.render.facts import run_facts
from pahq_hf.circuit.render.page import circuit_page
from pahq_hf.circuit.verdict import Verdict
from pahq_hf.cli.tables import sweep_table
from pahq_hf.config import EngineConfig
from pahq_hf.errors import CircuitError, ConfigError, RunError
from pahq_hf.evaluation.ground_truth.hand_built import load_known_model
from pahq_hf.search.acdc_options import ACDCConfig
from tests.helpers import assert_same_circuit, files_of, journal_lines, referee, run_main, wrapped
from tests.models import random_task
from tests.search.runs import interrupted
from tests.tiers import exhaustive, quick

TASK = random_task(batch=2, length=7, padding="right", seed=11, metric="logit_diff")
TAU = {"kl": 0.15, "logit_diff": 0.3}


def discover(out: Path | None = None, name: str = "llama", regime: Any = "fp32", **options: Any) -> Circuit:
    """Search over nodes of a tiny model."""
    chosen: dict[str, Any] = {"threshold": TAU["logit_diff"], "level": "node", "progress": False}
    return wrapped(name, regime=regime).discover(TASK, out=out, **(chosen | options))


# -- a plain loop ----------------------------------------------------------------------------------------


@dataclass
class Plain:
    """What ACDC over nodes finds by the referee, in float64 and with a whole run for each test."""

    scores: dict[str, float]
    kept: set[str]
    final: float


@cache
def plainly(
    name: str, metric: str, tau: float, ablation: str = "corrupted", criterion: str = "signed"
) -> Plain:
    judge = referee(name, TASK, metric=metric, ablation=ablation)
    edges = [(w.name, r.name) for w, r in _pairs(name)]
    removed: set[tuple[str, str]] = set()
    full = cur = judge.metric(removed)
    found = Plain({}, set(), cur)
    for node in reversed([writer.name for writer in wrapped(name).graph.writers[1:]]):
        without = removed | {edge for edge in edges if edge[0] == node}
        new = judge.metric(without)
        score = abs(new - full) - abs(cur - full) if criterion == "gap" else new - cur
        found.scores[node] = score
        if (abs(score) if criterion == "absolute" else score) < tau:
            removed, cur = without, new
        else:
            found.kept.add(node)
    found.final = cur
    return found


def _pairs(name: str) -> list[Any]:
    graph = wrapped(name).graph
    return [(w, r) for i, r in enumerate(graph.readers) for w in graph.writers[: int(graph.prefix[i])]]


CASES = [
    ("gpt2", "logit_diff", {}),
    ("llama", "kl", {}),
    ("gpt_neox", "logit_diff", {"criterion": "absolute"}),
    ("gemma2", "kl", {"ablation": "zero", "tau": 0.02}),
    ("llama", "logit_diff", {"ablation": "mean", "criterion": "gap"}),
    ("falcon_new", "kl", {}),
    ("olmo2", "logit_diff", {}),
    ("llama_split", "logit_diff", {"criterion": "gap"}),
]


@pytest.mark.parametrize("kind", ["sparse", "hooks"])
@pytest.mark.parametrize("case", quick(range(len(CASES)), 0, 1, 2, 3))
def test_it_decides_as_a_plain_loop_does(case: int, kind: Any) -> None:
    """Heads that share keys, layers in parallel, and heads that a norm couples."""
    name, metric, given = CASES[case]
    options: dict[str, Any] = {"tau": TAU[metric], **given}
    tau = options.pop("tau")
    expected = plainly(name, metric, tau, **options)
    ours = discover(None, name, metric=metric, threshold=tau, engine=EngineConfig(kind), **options)
    assert set(ours.node_scores) == set(expected.scores)
    assert max(abs(ours.node_scores[node] - score) for node, score in expected.scores.items()) < 1e-4
    assert set(ours.nodes) - {"input", "logits"} == expected.kept
    assert 0 < len(expected.kept) < len(expected.scores)
    assert ours.verified and abs(ours.record.metric.final - expected.final) < 1e-4  # type: ignore[operator]
    assert ours.record.nodes.to_json() == {
        "total": len(expected.scores),
        "tested": len(expected.scores),
        "kept": len(expected.kept),
    }


def test_the_circuit_is_the_edges_between_its_nodes() -> None:
    """Of a head that is out nothing reads, of a group what the head that is in needs."""
    ours = discover()
    inside = {*ours.nodes}
    for name, _ in ours.edges:
        writer, _, reader = name.partition("->")
        assert writer in inside
        node = reader.partition("<")[0]
        group = {f"{node[:3]}h{2 * int(node[-1]) + k}" for k in (0, 1)} if "kv" in node else {node}
        assert group & inside
    assert any("kv" in name for name, _ in ours.edges)
    graph = ours.to_networkx()
    assert {*graph.nodes} == inside and graph.nodes[ours.nodes[1]]["score"] == ours.node_scores[ours.nodes[1]]


@pytest.mark.parametrize("name", ["induction", "chain", "votes", exhaustive("xor")])
def test_known_models_have_their_true_nodes(name: str) -> None:
    known = load_known_model(name, n=8)
    model = PAHQModel(known.model, _fp32())
    ours = model.discover(known.task, threshold=0.002, level="node", progress=False)
    truth = {edge.partition("->")[0] for edge in known.edges} - {"input"}
    assert set(ours.nodes) - {"input", "logits"} == truth


def test_both_directions_find_nodes_that_back_each_other_up() -> None:
    """Noising finds one of the two, denoising the other, and the circuit has the edges between all."""
    known = load_known_model("backup", n=8)
    model = PAHQModel(known.model, _fp32())
    ours = model.discover(known.task, threshold=0.05, level="node", direction="both", progress=False)
    truth = {edge.partition("->")[0] for edge in known.edges} - {"input"}
    assert set(ours.nodes) - {"input", "logits"} == truth
    assert ours.verified
    gates = {name: ours.scored.more_of_node(name)["gate"] for name in truth}
    assert "OR" in gates.values()
    assert f"{len(truth)} of" in str(ours.record.nodes.text)
    assert "nodes found by" in render_card(ours)


def _fp32() -> Any:
    from tests.helpers import FP32

    return FP32


# -- precisions, budget, resamples -------------------------------------------------------------------------


def test_in_pahq_tests_are_fp32s() -> None:
    exact, ours = discover(), discover(regime="pahq")
    assert np.array_equal(ours.kept, exact.kept)
    for node, score in exact.node_scores.items():
        assert abs(ours.node_scores[node] - score) < 1e-5
    assert ours.verified and ours.discovery["second_looks"]["tests"] == 0


@pytest.mark.parametrize("regime", ["rtn"])
def test_engines_agree_in_low_precision(regime: Any) -> None:
    sparse, hooks = (discover(regime=regime, engine=EngineConfig(kind)) for kind in ("sparse", "hooks"))
    assert np.array_equal(sparse.kept, hooks.kept) and sparse.verified and hooks.verified
    scores = zip(sparse.node_scores.values(), hooks.node_scores.values(), strict=True)
    assert max(abs(one - other) for one, other in scores) < 1e-4


def test_a_budget_bounds_what_nodes_cost_together() -> None:
    ours = discover(search="budget", threshold=np.inf, max_gap=0.2, metric="kl")
    said, metric = ours.discovery["budget"], ours.record.metric
    assert ours.record.nodes.kept and ours.record.nodes.kept < 10
    assert abs(metric.final - said["full"]) <= said["bound"] + 1e-5  # type: ignore[operator]
    assert said["bound"] == pytest.approx(0.2 * abs(said["empty"] - said["full"]))


@pytest.mark.parametrize("max_gap", [0.2, 0.9])
def test_a_budgets_bound_is_a_share_of_what_no_edges_leave(max_gap: float) -> None:
    """The edge from input to logits is no node, and last tokens differ: without it the metric is another."""
    ours = discover(search="budget", threshold=np.inf, max_gap=max_gap)
    said, metric = ours.discovery["budget"], ours.record.metric
    assert said["empty"] == pytest.approx(metric.empty, abs=1e-5)
    faithful = ours.verdict.faithfulness if ours.verdict else None
    assert faithful is not None and abs(1 - faithful) <= max_gap + 1e-4


def test_what_refine_says_of_its_pairs_counts_from_no_edges() -> None:
    asked: dict[str, Any] = {"edges": 4, "validation": 0, "steps": 2, "progress": False}
    ours = wrapped("llama", regime="fp32").discover(TASK, search="refine", level="node", **asked)
    said, metric = ours.discovery["refine"]["searched"], ours.record.metric
    assert said["empty"] == pytest.approx(metric.empty, abs=1e-5)
    assert said["faithfulness"] == pytest.approx(metric.faithfulness, abs=1e-4)


def test_resamples_count_nodes(tmp_path: Path) -> None:
    ours = discover(tmp_path / "run", bootstrap=2)
    again = discover(tmp_path / "run", bootstrap=2, resume=True)
    nodes = again.scored_nodes
    assert nodes is not None and nodes.frequencies is not None
    parts = [Circuit.from_pretrained(tmp_path / "run" / f"resample-000{k}").scored_nodes for k in (1, 2)]
    assert np.array_equal(nodes.frequencies, np.mean([p.kept for p in parts if p], axis=0))
    consensus = Circuit.from_pretrained(tmp_path / "run" / "consensus")
    own = consensus.scored_nodes
    assert own is not None and np.array_equal(own.kept, nodes.frequencies >= 0.5)
    assert ours.record.bootstrap.consensus == own.count
    assert "nodes, in" in ours.record.bootstrap.texts["consensus"]
    assert_same_circuit(ours, again)


def test_a_sweep_finds_what_single_searches_do() -> None:
    found = wrapped("llama").sweep(TASK, thresholds=[0.1, 0.3], level="node", progress=False)
    for tau in (0.1, 0.3):
        alone = discover(threshold=tau)
        assert np.array_equal(found[tau].kept, alone.kept) and found[tau].node_scores == alone.node_scores


# -- files -----------------------------------------------------------------------------------------------


def test_an_interrupted_search_ends_in_the_same_bytes(tmp_path: Path) -> None:
    discover(tmp_path / "whole")
    steps = len(journal_lines(tmp_path / "whole")) - 1
    assert steps == 4  # heads and MLP of two layers
    for done in range(steps):
        folder = interrupted(tmp_path / "whole", tmp_path / f"from-{done}", done)
        discover(folder, resume=True)
        whole, ours = files_of(tmp_path / "whole"), files_of(folder)
        for files in (whole, ours):
            del files["discovery.json"]  # it has seconds
        assert ours == whole


def test_a_finished_run_is_held_against_its_journal(tmp_path: Path) -> None:
    ours = discover(tmp_path / "run")
    assert_same_circuit(discover(tmp_path / "run", resume=True), ours)
    with pytest.raises(RunError, match="level is node there, edge now"):
        discover(tmp_path / "run", resume=True, level="edge")
    discover(tmp_path / "pahq", regime="pahq")
    with pytest.raises(RunError, match="level is node there, edge now"):  # and not the margin, which follows
        discover(tmp_path / "pahq", regime="pahq", resume=True, level="edge")


def test_files_hold_nodes_and_say_when_they_do_not_fit(tmp_path: Path) -> None:
    ours = discover(tmp_path / "run")
    read = Circuit.from_pretrained(tmp_path / "run")
    assert read.node_scores == ours.node_scores and read.nodes == ours.nodes
    document = json.loads((tmp_path / "run" / "circuit.json").read_text())
    node = ours.nodes[1]
    assert document["nodes"][node] == {"in_graph": True, "score": ours.node_scores[node]}
    assert to_mib(ours)["nodes"][node] == document["nodes"][node]
    assert "score" not in to_mib(ours)["nodes"]["input"]  # EAP-IG: what has no score is always in

    (tmp_path / "run" / "discovery.json").unlink()
    scores = tmp_path / "run" / "scores.safetensors"
    tensors = load_file(scores)
    out = next(w for w in range(1, len(tensors["node_in_graph"])) if not tensors["node_in_graph"][w])
    tensors["node_in_graph"][out] = 1
    save_file(tensors, scores)
    with pytest.raises(CircuitError, match="not those between its kept nodes"):
        Circuit.from_pretrained(tmp_path / "run")
    del tensors["node_score"]
    save_file(tensors, scores)
    with pytest.raises(CircuitError, match="no 'node_score'"):
        Circuit.from_pretrained(tmp_path / "run")


def test_card_page_and_tables_show_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ours = discover(tmp_path / "run")
    kept = len(ours.nodes) - 2
    assert f"{kept} of 10 nodes, " in render_card(ours)
    page = circuit_page(ours)
    drawn = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    scores = {node["name"]: node["scores"] for node in drawn["nodes"]}
    assert scores == {name: [ours.node_scores.get(name)] for name in ours.nodes} and "nodes kept" in page
    assert run_main("show", str(tmp_path / "run")) == 0
    shown = capsys.readouterr().out
    assert f"Strongest {kept} nodes" in shown and "nodes kept" in shown and "level" in shown
    best = max(ours.nodes[1:-1], key=lambda name: ours.node_scores[name])
    assert best in shown and f"{ours.node_scores[best]:+.4g}" in shown
    assert run_main("show", str(tmp_path / "run"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["nodes"][best]["score"] == ours.node_scores[best]


def test_what_is_counted_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nodes are called nodes, with their edges beside them: in the log, cards, tables and pages of sweeps."""
    model = wrapped("llama", regime="fp32")
    with caplog.at_level("INFO"):
        best = model.attribute(TASK, method="eap", level="node", topn=3, progress=False)
    edges = f"{best.edge_count} of {best.graph.edge_count} edges"
    assert f"3 of 10 nodes, {edges}" in caplog.text
    assert "that of the best 3 nodes" in render_card(best)
    facts = run_facts(best)
    assert facts["best nodes"] == 3 and "best edges" not in facts and facts["nodes tested"] == 10

    most = model.discover(TASK, search="refine", level="node", edges=4, steps=0, progress=False)
    facts = run_facts(most)
    assert facts["most nodes"] == 4 and "most edges" not in facts
    again = Verdict.from_dict(most.record.to_json()["verdict"])
    assert again.nodes == most.record.nodes.kept and again.summary.startswith(f"{again.nodes} of 10 nodes, ")

    found = model.sweep(TASK, thresholds=[0.1, 0.3], out=tmp_path / "sweep", level="node", progress=False)
    row = found.rows[0]
    assert f"0.1: {row.nodes} nodes, {row.kept} edges" in repr(found)
    titles = [str(column.header) for column in sweep_table(found.rows).columns]
    assert titles[:4] == ["tau", "nodes", "edges", "tested"]
    assert [next(iter(column.cells)) for column in sweep_table(found.rows).columns][1:4] == [
        str(row.nodes),
        str(row.kept),
        "10",
    ]
    page = (tmp_path / "sweep" / "pareto.html").read_text()
    assert f"{row.nodes} nodes, {row.kept} edges, 10 nodes tested" in page


def test_edges_are_flagged_as_tested_where_their_nodes_were() -> None:
    whole = discover()
    assert whole.record.edges.tested == whole.graph.edge_count - 1
    assert not whole.tested[whole.graph.logits_reader, 0]  # from input to logits: neither can go
    part = wrapped("llama", layers=4, regime="fp32").discover(
        TASK, search="refine", level="node", edges=1, steps=1, validation=0, progress=False
    )
    nodes = part.scored_nodes
    assert nodes is not None and part.record.nodes.tested == nodes.tested.sum() < 20
    out = next(w for w in range(1, 21) if not nodes.tested[w])
    assert not part.tested[:, out].any() and part.tested[:, nodes.tested].any()
    assert part.record.edges.tested == part.tested.sum()
    assert part.record.edges.untested == part.graph.edge_count - part.tested.sum()


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = ["discover", "demo", "--task", "ioi", "--n", "2", "--precision", "fp32", "--threshold", "0.05"]
    assert run_main(*ours, "--level", "node", "--out", str(tmp_path / "run"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["nodes"]["total"] == 20


# -- what it cannot do -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readers": "logits"}, "level node has no readers"),
        ({"margin": 0.1}, "level node has no margin"),
        ({"screen": "eap-ig:0.5"}, "level node has no screen"),
        ({"tests": "verified"}, "level node has no tests"),
        ({"level": "head"}, "level must be one of edge, node"),
    ],
)
def test_what_is_about_edges_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ACDCConfig(**({"level": "node"} | options))


def test_the_papers_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="at level node use pahq, fp32 or rtn"):
        discover(regime="pahq-literal")
