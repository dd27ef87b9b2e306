"""Dead edges, dropped where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import Circuit, PAHQModel
from pahq_hf.circuit.render.palette import LIGHT
from pahq_hf.circuit.render.picture import draw
from pahq_hf.errors import CircuitError
from tests.helpers import run_main, wrapped
from tests.models import random_task

TASK = random_task(batch=2, seed=3)
SEARCHES: dict[str, dict[str, Any]] = {
    "acdc": {"threshold": 0.2},
    "budget": {"search": "budget", "max_gap": 0.5},
    "nodes": {"threshold": 0.3, "level": "node"},
    "zero": {"threshold": 0.2, "ablation": "zero"},
    "estimates": {"threshold": 0.2, "tests": "verified"},
    "eap": {"search": "eap", "topn": 9, "metric": "logit_diff"},
    "eap of nodes": {"search": "eap", "topn": 3, "metric": "logit_diff", "level": "node"},
    "both": {"search": "eap", "topn": 9, "metric": "logit_diff", "direction": "both"},
}


def found_by(model: PAHQModel, options: dict[str, Any], **more: Any) -> Circuit:
    return model.discover(TASK, progress=False, **options, **more)


@pytest.mark.crossing
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("model", ["gpt2", "gemma2"])
def test_what_is_left_is_what_was_alive(name: str, model: str, tmp_path: Path) -> None:
    subject, options = wrapped(model), SEARCHES[name]
    whole = found_by(subject, options)
    pruned = found_by(subject, options, prune_dead=True, out=tmp_path / "run")
    if name != "both":  # there each of the two is pruned, and what either finds is alive
        assert np.array_equal(pruned.kept, whole.live)
        assert np.array_equal(pruned.scores, whole.scores) and np.array_equal(pruned.tested, whole.tested)
    assert np.array_equal(pruned.live, pruned.kept) and pruned.verified is not False
    assert pruned.discovery["edges"]["kept"] == pruned.discovery["edges"]["live"] == pruned.edge_count
    facts = subject.evaluate(pruned, TASK)
    assert facts["metric"]["value"] == pytest.approx(pruned.discovery["metric"]["fp32"], abs=1e-6)
    assert pruned.discovery["arguments"]["prune_dead"] and "prune_dead" not in whole.discovery["arguments"]
    again = found_by(subject, options, prune_dead=True, out=tmp_path / "run", resume=True)
    assert np.array_equal(again.kept, pruned.kept)


def test_there_are_dead_edges_to_drop() -> None:
    """Else the tests above would say nothing."""
    dead = {name: found_by(wrapped("gpt2"), options) for name, options in SEARCHES.items()}
    counts = {name: circuit.edge_count - int(circuit.live.sum()) for name, circuit in dead.items()}
    assert counts["eap"] and counts["zero"] | counts["acdc"] | counts["budget"], counts


def test_dropped_edges_are_not_audited() -> None:
    model = wrapped("gpt2")
    circuit = found_by(model, SEARCHES["acdc"], prune_dead=True)
    with pytest.raises(CircuitError, match="dead edges that it kept were dropped"):
        model.evaluate(circuit, TASK, audit=3)


def test_dead_edges_are_grey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circuit = found_by(wrapped("gpt2"), SEARCHES["eap"] | {"topn": 20})
    circuit.save_pretrained(tmp_path / "run")
    assert run_main("show", str(tmp_path / "run")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "->" in line]
    dead = {name for name, _ in circuit.edges if not circuit.live[circuit.graph.parse_edge(name)]}
    shown = {name: line for name, _ in circuit.edges for line in lines if name in line}
    assert {name for name, line in shown.items() if "dead" in line} == dead & shown.keys()
    assert 0 < len(dead & shown.keys()) < len(shown)
    draw(circuit.scored, tmp_path / "whole.svg", "svg")
    whole = (tmp_path / "whole.svg").read_text()
    assert whole.count(LIGHT.faint) == len(dead) + 1  # and the legend's line
    pruned = found_by(wrapped("gpt2"), SEARCHES["eap"], prune_dead=True)
    draw(pruned.scored, tmp_path / "pruned.svg", "svg")
    assert LIGHT.faint not in (tmp_path / "pruned.svg").read_text()


def test_commands(tmp_path: Path) -> None:
    run = ("demo", "--task", "gendered_pronoun", "--n", "2", "--precision", "fp32", "--prune-dead")
    out = tmp_path / "run"
    scored = ("--method", "eap", "--metric", "logit_diff", "--topn", "15")
    assert run_main("attribute", *run, *scored, "--out", str(out)) == 0
    circuit = Circuit.from_pretrained(out)
    assert np.array_equal(circuit.kept, circuit.live) and circuit.edge_count < 15
