"""Results are written before pictures, which may fail; and what died while saving can begin anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

import pahq_hf.circuit.render.picture
from pahq_hf import Circuit, Sweep
from pahq_hf.circuit.card import render_card
from pahq_hf.circuit.files import refuse_overwrite
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.circuit.render.layout import DRAWN_EDGES, layout
from pahq_hf.circuit.render.picture import draw
from pahq_hf.errors import CircuitError, RunError
from tests.helpers import (
    assert_same_circuit,
    files_of,
    id_rows,
    run_main,
    save_tiny,
    small_disk,
    wrapped,
    write_rows,
)
from tests.search.runs import TASK

RESULTS = {"circuit.json", "scores.safetensors", "discovery.json", "means.safetensors"}
FEW = {"threshold": 0.05, "readers": "logits,m1"}


def discover(out: Path | None = None, **options: Any) -> Circuit:
    return wrapped("llama").discover(TASK, out=out, progress=False, **(FEW | options))


def attribute(out: Path) -> Circuit:
    return wrapped("llama").attribute(TASK, out=out, topn=20)


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return discover()


def large(kept: int, seed: int = 0) -> Circuit:
    """A circuit of so many edges of GPT-2 small's graph, with scores."""
    graph = Graph(GraphSpec(layers=12, heads=12, kv_groups=12))
    generator = np.random.default_rng(seed)
    scores = np.where(graph.all_edges, generator.normal(size=graph.all_edges.shape), 0.0)
    edges = np.argwhere(graph.all_edges)
    chosen = graph.no_edges()
    chosen[tuple(edges[generator.permutation(len(edges))[:kept]].T)] = True
    return Circuit(graph, chosen, scores, graph.all_edges.copy())


# -- pictures may fail -----------------------------------------------------------------------------------


def test_a_matplotlibrc_does_not_reach_pictures(circuit: Circuit, tmp_path: Path) -> None:
    """With TeX on a machine that has none, drawing failed and a search was lost."""
    circuit.save_pretrained(tmp_path / "plain")
    with matplotlib.rc_context({"text.usetex": True, "savefig.facecolor": "red"}):
        circuit.save_pretrained(tmp_path / "own")
    assert files_of(tmp_path / "own") == files_of(tmp_path / "plain")


@pytest.mark.parametrize("name", ["README.md", "circuit.png"])
def test_a_folder_in_the_place_of_a_picture_or_card(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).mkdir()
    found = discover(tmp_path)
    assert_same_circuit(Circuit.from_pretrained(tmp_path), found)
    assert set(files_of(tmp_path)) >= RESULTS and (tmp_path / name).is_dir()
    assert f"{name} was not made, the results do not depend on it: cannot write" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("no latex"), MemoryError(), OSError(28, "full")])
def test_whatever_drawing_raises_is_a_warning(
    error: Exception,
    circuit: Circuit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pahq_hf.circuit.render.picture, "draw", fail)
    circuit.save_pretrained(tmp_path)
    assert_same_circuit(Circuit.from_pretrained(tmp_path), circuit)
    assert set(files_of(tmp_path)) == RESULTS | {"README.md"}
    assert "circuit.png was not made" in caplog.text
    assert "circuit.png" not in (tmp_path / "README.md").read_text()


def test_a_disk_with_room_for_results_only(
    circuit: Circuit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    circuit.save_pretrained(tmp_path / "room")
    sizes = {name: len(raw) for name, raw in files_of(tmp_path / "room").items()}
    most = max(sizes[name] for name in RESULTS)
    assert sizes["circuit.png"] > most
    with small_disk(most):
        circuit.save_pretrained(tmp_path / "full")
    assert set(files_of(tmp_path / "full")) == RESULTS | {"README.md"}
    assert "circuit.png was not made" in caplog.text


def test_a_full_disk_leaves_the_old_circuit_whole(circuit: Circuit, tmp_path: Path) -> None:
    """Whichever file finds no room: none is replaced before all are on disk."""
    out = tmp_path / "out"
    circuit.save_pretrained(out)
    before = files_of(out)
    other = discover(threshold=0.0)
    for limit in sorted({len(before[name]) - 1 for name in RESULTS}):
        with small_disk(limit), pytest.raises(RunError, match="cannot write"):
            other.save_pretrained(out)
        assert files_of(out) == before


def test_the_plots_of_a_sweep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pareto.png").mkdir()
    options = FEW | {"thresholds": [0.05, 0.2]}
    del options["threshold"]
    wrapped("llama").sweep(TASK, out=tmp_path, progress=False, **options)
    assert list(Sweep.from_pretrained(tmp_path)) == [0.05, 0.2]
    assert "pareto.png was not made" in caplog.text
    assert {"pareto.svg", "pareto.html"} <= set(files_of(tmp_path))


def test_the_plots_of_an_evaluation(
    circuit: Circuit, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    circuit.save_pretrained(tmp_path / "run")
    save_tiny(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", id_rows(TASK))
    (tmp_path / "plots" / "roc.png").mkdir(parents=True)
    arguments = ["--model", tmp_path / "model", "--task", rows, "--reference", tmp_path / "run"]
    run = ["evaluate", tmp_path / "run", *arguments, "--plots", tmp_path / "plots", "--json"]
    assert run_main(*map(str, run)) == 0
    assert json.loads(capsys.readouterr().out)["reference"]["edges"]["roc"]["auc"]
    assert "plots was not made" in caplog.text


# -- pictures are bounded --------------------------------------------------------------------------------


def test_of_many_edges_the_strongest_are_drawn(tmp_path: Path) -> None:
    many = large(9_000)
    drawn = {(edge.writer, edge.reader_name) for edge in layout(many.scored, most=DRAWN_EDGES).edges}
    ranked = sorted(many.edges, key=lambda edge: -abs(edge[1]))
    assert drawn == {tuple(name.split("->")) for name, _ in ranked[:DRAWN_EDGES]}
    draw(many.scored, tmp_path / "many.svg", "svg")
    picture = (tmp_path / "many.svg").read_text()
    assert "9,000 of 32,491 edges; the 4,000 with the largest scores are drawn" in picture
    assert picture.count("<use ") < DRAWN_EDGES + 2_000  # a line an edge, a mark a node
    assert "The picture shows the 4,000 edges with the largest scores." in render_card(many)


def test_of_few_edges_all_are_drawn(circuit: Circuit) -> None:
    assert layout(circuit.scored, most=circuit.edge_count) == layout(circuit.scored)
    assert "The picture shows" not in render_card(circuit)


# -- what died while saving ------------------------------------------------------------------------------


def test_an_attribution_on_a_full_disk_can_be_tried_again(tmp_path: Path) -> None:
    whole = attribute(tmp_path / "whole")
    for number, limit in enumerate(sorted({len(raw) - 1 for raw in files_of(tmp_path / "whole").values()})):
        out = tmp_path / str(number)
        try:
            with small_disk(limit):
                attribute(out)
        except RunError:
            assert_same_circuit(attribute(out), whole)
        assert_same_circuit(Circuit.from_pretrained(out), whole)


def test_what_an_earlier_version_left_of_an_attribution_is_no_run(tmp_path: Path) -> None:
    """It wrote facts and scores before the circuit."""
    whole = attribute(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "left")
    (tmp_path / "left" / "circuit.json").unlink()
    assert_same_circuit(attribute(tmp_path / "left"), whole)
    with pytest.raises(RunError, match=r"holds a run already \(circuit\.json\)"):
        refuse_overwrite(tmp_path / "left")


def test_somebodys_own_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "circuit.png").write_bytes(b"mine")
    for run in (discover, attribute):
        with pytest.raises(RunError, match=r"a file circuit\.png, which a run would replace"):
            run(tmp_path)
    assert files_of(tmp_path) == {"circuit.png": b"mine"}


# -- what was changed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scores.safetensors", "means.safetensors"])
def test_altered_tensors_are_named(name: str, circuit: Circuit, tmp_path: Path) -> None:
    circuit.save_pretrained(tmp_path)
    raw = bytearray((tmp_path / name).read_bytes())
    raw[-1] ^= 1
    (tmp_path / name).write_bytes(bytes(raw))
    with pytest.raises(CircuitError, match=rf"{name} is damaged: its checksum"):
        Circuit.from_pretrained(tmp_path)


def test_an_altered_score_is_named(circuit: Circuit, tmp_path: Path) -> None:
    circuit.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "circuit.json").read_text())
    name = next(iter(document["edges"]))
    document["edges"][name]["score"] += 1.0
    (tmp_path / "circuit.json").write_text(json.dumps(document))
    with pytest.raises(CircuitError, match=f"disagree on the score of {name}"):
        Circuit.from_pretrained(tmp_path)
