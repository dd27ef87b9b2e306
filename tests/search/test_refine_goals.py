"""What `refine` can be asked for: a size, a gap, or a ranking of all edges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pahq_hf import Circuit, PAHQModel
from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.config import EngineConfig, PAHQConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError, RunError
from pahq_hf.search.attribution.selection import top_edges
from pahq_hf.search.journal import Chain
from pahq_hf.search.rounds import changed
from pahq_hf.tasks.base import Task
from tests.helpers import assert_same_circuit, interrupted_after, run_main, wrapped
from tests.models import random_task, tiny_gpt2
from tests.tiers import quick

TASK = random_task(batch=4, seed=21, metric="kl")
WIDE = random_task(batch=12, length=7, padding="right", seed=11, metric="kl")
OPTIONS: dict[str, Any] = {
    "search": "refine",
    "steps": 2,
    "minibatch": 3,
    "validation": 0.34,
    "progress": False,
}
GAP: dict[str, Any] = {"max_gap": 0.4}
CURVE: dict[str, Any] = {"curve": True}


def small() -> PAHQModel:
    return wrapped("gpt2", layers=1)


def refined(out: Path | None = None, task: Task = WIDE, **options: Any) -> Circuit:
    return small().discover(task, out=out, **(OPTIONS | options))


def engine_on(task: Task, model: PAHQModel | None = None) -> Engine:
    model = model or small()
    return make_engine(Setting(model.patched, task, "kl", "corrupted", model.pahq_config), EngineConfig())


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()][1:]


def passed_by(folder: Path) -> list[BoolArray]:
    """The circuits that a search came through."""
    found = [load_file(folder / "learned.safetensors")["start"].astype(bool)]
    for step in steps_of(folder):
        if "removed" in step:
            edges = [[tuple(edge) for edge in step.get(name, [])] for name in ("removed", "added")]
            found.append(changed(found[-1], *edges))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("goals")
    refined(folder / "gap", **GAP)
    refined(folder / "curve", **CURVE)
    return {"gap": folder / "gap", "curve": folder / "curve"}


def test_the_smallest_circuit_within_the_gap_of_pairs_that_judge_is_kept(runs: dict[str, Path]) -> None:
    folder, circuit = runs["gap"], Circuit.from_pretrained(runs["gap"])
    engine = engine_on(WIDE.select(steps_of(folder)[0]["validation"]))
    bound = 0.4 * engine.metric_of(circuit.graph.no_edges())
    passed = passed_by(folder)
    sizes = [int(kept.sum()) for kept in passed if engine.metric_of(kept) <= bound]
    assert circuit.verified and circuit.edge_count == min(sizes) < passed[0].sum()
    assert engine.metric_of(circuit.kept) <= bound
    assert min(int(kept.sum()) for kept in passed) < circuit.edge_count  # those are not within it there


def test_without_pairs_that_judge_no_edge_can_go_within_the_gap() -> None:
    """By brute force."""
    engine = engine_on(TASK)
    circuit = refined(task=TASK, **GAP)
    bound = 0.4 * engine.metric_of(circuit.graph.no_edges())
    assert circuit.discovery["refine"]["locally_minimal"] is True
    assert engine.metric_of(circuit.kept) <= bound
    for edge in edge_list(circuit.kept):
        assert engine.metric_of(changed(circuit.kept, [edge], ())) > bound


def nearly_idle(share: float) -> PAHQModel:
    """A model whose first head writes a small share of what it did: next to nothing, though not nothing."""
    model = tiny_gpt2(layers=1)
    rows = model.config.n_embd // model.config.n_head
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight[:rows] *= share
    return PAHQModel(model, PAHQConfig(regime="fp32"))


@pytest.mark.parametrize(("task", "share", "is_back"), [(TASK, 1e-4, False), (WIDE, 2e-3, True)])
def test_a_gap_of_nothing_takes_the_edges_that_do_something(
    task: Task, share: float, is_back: bool, tmp_path: Path
) -> None:
    """Each does something on the pairs that are searched or on those that judge, by brute force."""
    model, options = nearly_idle(share), OPTIONS | {"max_gap": 0.0, "steps": 0}
    circuit = model.discover(task, out=tmp_path / "run", **options)
    judging = steps_of(tmp_path / "run")[0]["validation"]
    kinds = [task.select([k for k in range(len(task)) if k not in judging])]
    engines = [engine_on(pairs, model) for pairs in (*kinds, *([task.select(judging)] if judging else []))]
    wholes = [engine.metric_of(circuit.graph.no_edges()) for engine in engines]
    assert circuit.verified and (circuit.kept == circuit.live).all()
    assert not [name for name, _ in circuit.edges if "a0.h0" in name]
    for engine, most in zip(engines, wholes, strict=True):
        assert engine.metric_of(circuit.kept) <= 1.1e-4 * most
    for edge in edge_list(circuit.kept):
        without = changed(circuit.kept, [edge], ())
        moved = [engine.metric_of(without) - engine.metric_of(circuit.kept) for engine in engines]
        assert any(abs(by) > 0.9e-6 * most for by, most in zip(moved, wholes, strict=True))
    steps = steps_of(tmp_path / "run")
    assert steps[-1].get("back", False) is is_back
    with interrupted_after(len(steps) - 1):
        model.discover(task, out=tmp_path / "parts", **options)
    assert_same_circuit(model.discover(task, out=tmp_path / "parts", resume=True, **options), circuit)
    assert_same_circuit(model.discover(task, out=tmp_path / "run", resume=True, **options), circuit)
    assert steps_of(tmp_path / "parts") == steps


def test_a_curve_ranks_all_edges_as_the_search_came_through_them(runs: dict[str, Path]) -> None:
    folder, circuit = runs["curve"], Circuit.from_pretrained(runs["curve"])
    graph: Graph = circuit.graph
    assert (circuit.kept == graph.all_edges).all() and circuit.verified
    scores = circuit.scores[graph.all_edges]
    assert len(np.unique(scores)) == graph.edge_count and scores.min() > 0 and scores.max() == 1
    curve, passed = circuit.discovery["refine"]["curve"], passed_by(folder)
    assert [row["edges"] for row in curve] == [int(kept.sum()) for kept in passed] and curve[-1]["edges"] == 0
    numbers = steps_of(folder)[0]["validation"]
    searched = engine_on(WIDE.select([k for k in range(12) if k not in numbers]))
    judging = engine_on(WIDE.select(numbers))
    for row, kept in zip(curve, passed, strict=True):
        best = top_edges(graph, circuit.scores, row["edges"], absolute=False)
        assert (best == kept).all()
        assert row["metric"] == pytest.approx(searched.metric_of(best), abs=1e-5)
        assert row["validation"] == pytest.approx(judging.metric_of(best), abs=1e-5)


@pytest.mark.parametrize("steps", quick([1, 2, 3, 5], 1, 5))
@pytest.mark.parametrize(("name", "goal"), [("gap", GAP), ("curve", CURVE)])
def test_an_interrupted_run_ends_where_another_does(
    runs: dict[str, Path], tmp_path: Path, name: str, goal: dict[str, Any], steps: int
) -> None:
    with interrupted_after(steps):
        refined(tmp_path, **goal)
    assert_same_circuit(refined(tmp_path, resume=True, **goal), Circuit.from_pretrained(runs[name]))
    for file in ("circuit.json", "scores.safetensors", "journal.jsonl", "learned.safetensors"):
        assert (tmp_path / file).read_bytes() == (runs[name] / file).read_bytes(), file


def test_a_level_that_is_missing_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    """A round where a level should stand is never taken for the end of learning."""
    lines = [json.loads(line) for line in (runs["curve"] / "journal.jsonl").read_text().splitlines()]
    chain = Chain()
    sealed = [
        chain.seal({k: v for k, v in line.items() if k != "check"}) for line in lines if "level" not in line
    ]
    (tmp_path / "journal.jsonl").write_bytes(b"".join(sealed))
    with pytest.raises(RunError, match="record 2 on line 3: a level of learning should stand there"):
        refined(tmp_path, resume=True, **CURVE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of edges .* got none"),
        ({"edges": 5, "max_gap": 0.1}, "got edges and max_gap"),
        ({"edges": 5, "curve": True}, "got edges and curve"),
        ({"curve": 1}, "curve must be true or false"),
        ({"max_gap": 1.0}, "max_gap must be a share from 0 to below 1; got 1.0"),
        ({"max_gap": -0.1}, "max_gap must be a share"),
        ({"max_gap": float("nan")}, "max_gap"),
        ({"edges": 5, "validation": 0.6}, "validation must be a share from 0 to 0.5"),
        ({"edges": 5, "learn_pairs": -1}, "learn_pairs must be a whole number from 0 on"),
    ],
)
def test_what_is_asked_for_is_one_thing(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        refined(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


# -- which search is meant ----------------------------------------------------------------------------------


def test_a_number_of_edges_means_refine() -> None:
    model = small()
    found = model.discover(TASK, edges=6, steps=0, progress=False)
    assert found.record.method == "refine" and found.edge_count <= 6
    assert model.discover(TASK, threshold=0.5, progress=False).record.method == "acdc"
    with pytest.raises(ConfigError, match="give one of them, or name the search"):
        model.discover(TASK, edges=6, threshold=0.5, progress=False)
    with pytest.raises(ConfigError, match="edges"):
        model.discover(TASK, search="acdc", edges=6, progress=False)


def test_so_it_does_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["discover", "demo", "--task", "ioi", "--n", "2", "--metric", "kl", "--edges", "12"]
    out = tmp_path / "run"
    assert run_main(*arguments, "--steps", "0", "--out", str(out)) == 0
    assert json.loads((out / "discovery.json").read_text())["method"] == "refine"
    capsys.readouterr()
    for more, words in (
        (["--threshold", "0.1"], "give one of them, or name the search"),
        (["--search", "acdc"], "search 'acdc' takes no --edges"),
    ):
        assert run_main(*arguments, *more, "--out", str(tmp_path / "other")) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "other").exists()
