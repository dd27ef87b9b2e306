"""Attribution and `refine` at level node."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pahq_hf import Circuit
from pahq_hf.circuit.nodes import edges_between
from pahq_hf.engine.build import make_circuit_runs
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError
from pahq_hf.search.attribution.options import AttributionConfig
from tests.helpers import assert_same_circuit, files_of, journal_lines, referee, run_main, wrapped
from tests.models import random_task
from tests.search.runs import interrupted
from tests.tiers import exhaustive, quick

TASK = random_task(batch=2, length=7, padding="right", seed=11, metric="logit_diff")
FAMILIES = ["gpt2", "llama", "gpt_neox", "gemma2", "falcon_new", "llama_split"]


def attribute(
    out: Path | None = None, name: str = "llama", dtype: Any = torch.float32, **options: Any
) -> Circuit:
    """Score the nodes of a tiny model."""
    chosen: dict[str, Any] = {"method": "eap", "level": "node", "progress": False}
    return wrapped(name, dtype=dtype).attribute(TASK, out=out, **(chosen | options))


@pytest.mark.parametrize("name", quick(FAMILIES, "gpt2", "llama", "gpt_neox", "gemma2"))
def test_a_score_is_the_metrics_slope_as_the_node_goes(name: str) -> None:
    """By differences in float64: a small part of all that the node writes is replaced, everywhere."""
    ours = attribute(None, name, torch.float64)
    model = wrapped(name, dtype=torch.float64)
    runs = make_circuit_runs(Setting(model.patched, TASK, "logit_diff", "corrupted", model.pahq_config))
    (part,) = runs.circuit_parts()
    step = 1e-5
    for number, writer in enumerate(model.graph.writers[1:], start=1):
        values = []
        for share in (1 + step, 1 - step):
            shares = model.graph.all_edges.astype(float)
            shares[:, number] *= share
            values.append(runs.at_circuit(part, shares)[0])
        slope = (values[1] - values[0]) / (2 * step)
        assert ours.node_scores[writer.name] == pytest.approx(slope, rel=1e-5, abs=1e-7), writer.name


@pytest.mark.parametrize("name", ["gpt2", exhaustive("llama"), "gpt_neox"])
def test_exact_scores_are_the_referees(name: str) -> None:
    ours, judge = attribute(None, name, method="exact"), referee(name, TASK, metric="logit_diff")
    graph = ours.graph
    full = judge.metric(set())
    for number, writer in enumerate(graph.writers[1:], start=1):
        readers = [r.name for i, r in enumerate(graph.readers) if number < graph.prefix[i]]
        alone = judge.metric({(writer.name, reader) for reader in readers}) - full
        assert abs(ours.node_scores[writer.name] - alone) < 1e-4
    assert ours.record.evaluations == 1 + (len(graph.writers) - 1) + 1  # all of it, without each, the circuit


def test_scores_of_edges_add_up_to_those_of_nodes() -> None:
    for method in ("eap-ig", "clean-corrupted", "gim"):
        nodes, edges = (attribute(method=method, level=level) for level in ("node", "edge"))
        assert nodes.scored_nodes is not None
        assert np.allclose(nodes.scored_nodes.scores[1:], edges.scores.sum(axis=0)[1:], rtol=1e-5, atol=1e-7)
    nodes, edges = (attribute(method="hisp", level=level) for level in ("node", "edge"))
    assert nodes.scored_nodes is not None
    assert np.array_equal(nodes.scored_nodes.scores[1:], edges.scores[-1, 1:])  # `logits` is always in
    shares = [attribute(method=method).node_scores for method in ("eap", "eap-ig")]
    both = attribute(method="ensemble", members="eap,eap-ig").node_scores
    for name in both:
        mean = np.mean([own[name] / sum(map(abs, own.values())) for own in shares])
        assert both[name] == pytest.approx(float(mean))


def test_the_best_nodes_make_the_circuit() -> None:
    for options, size in (({"topn": 4}, abs), ({"topn": 4, "absolute": False}, float)):
        ours = attribute(**({"absolute": True} | options))
        best = sorted(ours.node_scores, key=lambda name: -size(ours.node_scores[name]))[:4]
        nodes = ours.scored_nodes
        assert nodes is not None and set(ours.nodes) - {"input", "logits"} == set(best)
        assert np.array_equal(ours.kept, edges_between(ours.graph, nodes.kept)) and ours.verified is None
        kept = np.abs(ours.scores) if size is abs else ours.scores
        assert kept[ours.kept].min() >= min(size(ours.node_scores[name]) for name in best) - 1e-12
    cut = sorted(ours.node_scores.values())[-3]
    chosen = attribute(threshold=cut)
    assert chosen.size == (3, 10) and chosen.record.nodes.text == "3 of 10"
    assert attribute().size == (10, 10)
    assert attribute().edge_count == ours.graph.edge_count
    drawn = attribute(method="random", seed=1)
    assert attribute(method="random", seed=1).node_scores == drawn.node_scores
    assert attribute(method="random", seed=2).node_scores != drawn.node_scores


def test_both_directions_choose_nodes() -> None:
    ours = attribute(topn=3, direction="both", metric="logit_diff", method="eap-ig")
    parts = [attribute(topn=3, direction=way, method="eap-ig") for way in ("noising", "denoising")]
    assert set(ours.nodes) == {*parts[0].nodes, *parts[1].nodes}
    nodes = ours.scored_nodes
    assert nodes is not None and nodes.found_by is not None and (nodes.found_by[1:] > 0).sum() == nodes.count


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    attribute(tmp_path / "whole", method="exact")
    assert len(journal_lines(tmp_path / "whole")) == 1 + 4
    folder = interrupted(tmp_path / "whole", tmp_path / "half", 2)
    attribute(folder, method="exact", resume=True)
    whole, ours = files_of(tmp_path / "whole"), files_of(folder)
    for files in (whole, ours):
        del files["discovery.json"]  # it has seconds
    assert ours == whole
    again = attribute(folder, method="exact", resume=True)
    assert_same_circuit(again, Circuit.from_pretrained(tmp_path / "whole"))


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["attribute", "demo", "--task", "ioi", "--n", "2", "--precision", "fp32", "--level", "node"]
    assert run_main(*command, "--topn", "5", "--out", str(tmp_path / "run"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["nodes"] == {"total": 20, "tested": 20, "kept": 5}
    assert run_main(*command, "--topn", "21", "--out", str(tmp_path / "more")) == 2
    assert "this model has 20 nodes; cannot keep 21 of them" in capsys.readouterr().err


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="level must be one of edge, node"):
        AttributionConfig(level="heads")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at level node use pahq, fp32 or rtn"):
        wrapped("llama", regime="pahq-literal").attribute(TASK, method="exact", level="node", progress=False)


# -- refine ------------------------------------------------------------------------------------------------

REFINE: dict[str, Any] = {
    "search": "refine",
    "level": "node",
    "edges": 4,
    "metric": "kl",
    "steps": 1,
    "learn_pairs": 0,
    "validation": 0.0,
}


def test_refine_finds_nodes_that_nothing_betters(tmp_path: Path) -> None:
    """Its gap is the referee's, no larger than that of the best by attribution, and no node is in the way."""
    model, judge = wrapped("llama"), referee("llama", TASK, metric="kl")
    ours = model.discover(TASK, out=tmp_path / "whole", progress=False, **REFINE)
    graph, nodes = ours.graph, ours.scored_nodes
    assert nodes is not None and 0 < nodes.count <= 4 and ours.verified
    assert ours.discovery["refine"]["locally_minimal"]

    def gap(inside: set[str]) -> float:
        removed = {
            (w.name, r.name)
            for i, r in enumerate(graph.readers)
            for w in graph.writers[: int(graph.prefix[i])]
            if w.name not in inside
        }
        return judge.metric(removed)

    inside = set(ours.nodes) - {"logits"}
    found = gap(inside)
    assert ours.record.metric.fp32 == pytest.approx(found, abs=1e-5)
    whole = gap({"input"})
    for name in inside - {"input"}:
        assert gap(inside - {name}) >= found - 1e-3 * whole
    others = attribute(method="eap-ig", metric="kl", topn=4, absolute=True)
    assert found <= gap(set(others.nodes) - {"logits"}) + 1e-6
    assert all(0 <= score <= 1 for score in ours.node_scores.values())
    least = min(ours.node_scores[name] for name in inside - {"input"})
    assert all(score < least for name, score in ours.node_scores.items() if name not in inside)

    # Stopped after the first round, it ends in the same bytes.
    folder = interrupted(tmp_path / "whole", tmp_path / "half", 3)
    shutil.copy(tmp_path / "whole" / "learned.safetensors", folder)
    model.discover(TASK, out=folder, progress=False, resume=True, **REFINE)
    assert (folder / "journal.jsonl").read_bytes() == (tmp_path / "whole" / "journal.jsonl").read_bytes()
    assert (folder / "scores.safetensors").read_bytes() == (
        tmp_path / "whole" / "scores.safetensors"
    ).read_bytes()
    model.discover(TASK, out=folder, progress=False, resume=True, **REFINE)  # held against its journal


def test_refine_counts_nodes() -> None:
    with pytest.raises(ConfigError, match="this model has 10 nodes; cannot keep 11 of them"):
        wrapped("llama").discover(TASK, progress=False, **(REFINE | {"edges": 11}))
    ours = wrapped("llama").discover(TASK, progress=False, **(REFINE | {"edges": None, "max_gap": 0.3}))
    metric = ours.record.metric
    assert ours.size[0] < 10 and ours.verified
    assert metric.fp32 is not None and metric.full is not None
