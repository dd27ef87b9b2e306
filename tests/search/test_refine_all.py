"""`refine` of a graph that is so small that every edge is tested: nothing is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pahq_hf import Circuit, PAHQModel
from pahq_hf.errors import RunError
from pahq_hf.search.refine_options import RefineOptions
from pahq_hf.search.rounds import GAIN, NOTHING, Scale
from tests.helpers import assert_same_circuit, files_of, interrupted_after, journal_lines, wrapped
from tests.models import random_task

TASK = random_task(batch=4, length=6, seed=21, metric="kl")


def small() -> PAHQModel:
    return wrapped("gpt2", layers=1)


def refined(out: Path, **options: Any) -> Circuit:
    asked: dict[str, Any] = {"search": "refine", "edges": 6, "progress": False}
    return small().discover(TASK, out=out, **(asked | options))


def test_tests_start_from_all_edges(tmp_path: Path) -> None:
    """And an interrupted run goes on to the same bytes; a finished one is what its journal tells of."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    circuit = refined(whole)
    facts = circuit.discovery["refine"]
    assert facts["start"] == circuit.graph.edge_count and facts["learned_on"] == 0 and circuit.verified
    assert circuit.edge_count <= 6 and not (whole / "learned.safetensors").exists()
    lines = journal_lines(whole)
    assert json.loads(lines[0])["refine"]["steps"] is None
    for steps in (1, len(lines) - 2):
        with interrupted_after(steps - len(journal_lines(cut)[1:]) if cut.exists() else steps):
            refined(cut, resume=cut.exists())
    assert_same_circuit(refined(cut, resume=True), circuit)
    before, after = files_of(whole), files_of(cut)
    for name in ("circuit.json", "scores.safetensors", "journal.jsonl"):
        assert after[name] == before[name], name
    (cut / "journal.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(RunError):
        refined(cut, resume=True)


@pytest.mark.parametrize("option", [{"steps": 1}, {"rate": 0.1}, {"noise": 0.1}, {"minibatch": 2}])
def test_who_asks_for_learning_has_it(option: dict[str, Any], tmp_path: Path) -> None:
    learned = RefineOptions(edges=6, **option).settled(tests_all=True)
    assert learned.steps == option.get("steps", 20)
    assert RefineOptions(edges=6).settled(tests_all=True).steps is None
    assert RefineOptions(edges=6).settled(tests_all=False).steps == 20
    if "steps" in option:
        assert refined(tmp_path / "run", **option).discovery["refine"]["learned_on"] > 0


def test_near_the_full_model_less_is_a_gain() -> None:
    """A twentieth of a circuit's own gap, where that is less than a share of the whole; rounding is none."""
    scale = Scale(full=-2.0, empty=3.0)
    assert scale.gain(1.0) == pytest.approx(5 * GAIN)
    assert scale.gain(0.001) == pytest.approx(0.00005)
    assert scale.gain(0.0) == pytest.approx(5 * NOTHING)
