"""Folders that earlier versions wrote load, evaluate and resume, and searches find what they found.

`tests/earlier/first` was written at commit 095778c, `tests/earlier/before_rooms` at 0f3f08b, by

    pahq discover demo --task ioi --n 4 --threshold 0.1 --precision fp32 --out discover
    pahq sweep demo --task ioi --n 4 --thresholds 0.3,0.1 --precision fp32 --out sweep
    pahq attribute demo --task ioi --n 4 --precision fp32 --out attribute

and `PAHQConfig(regime="pahq", format="int8").save_pretrained("config")`; pictures were left out. Between the
two KL came to be computed without cancellation, which moved scores by up to 3e-6.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pahq_hf import Circuit, PAHQConfig, Sweep
from tests.helpers import files_of, journal_lines, run_main, unsealed

EARLIER = Path(__file__).parents[1] / "earlier"
VERSIONS = ["first", "before_rooms"]
RUNS = ["discover", "attribute", "sweep/tau-0.3", "sweep/tau-0.1"]
TASK = ("--task", "ioi", "--n", "4")
DISCOVER = ("discover", "demo", *TASK, "--threshold", "0.1", "--precision", "fp32")


@pytest.fixture(params=VERSIONS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what one version wrote."""
    return Path(shutil.copytree(EARLIER / request.param, tmp_path / "earlier"))


def read(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


@pytest.mark.parametrize("run", RUNS)
def test_circuits_load(folder: Path, run: str) -> None:
    circuit = Circuit.from_pretrained(folder / run)
    written = read(folder / run / "circuit.json")["edges"]
    assert dict(circuit.edges) == {edge: facts["score"] for edge, facts in written.items()}
    tensors = load_file(folder / run / "scores.safetensors")
    assert np.array_equal(circuit.scores, tensors["score"], equal_nan=True)
    assert np.array_equal(circuit.tested, tensors["tested"].astype(bool))
    facts = read(folder / run / "discovery.json")
    facts.pop("checksums", None)  # of files, not of the circuit
    assert circuit.discovery == facts


@pytest.mark.parametrize("run", ["discover", "attribute"])
def test_circuits_are_as_good_as_they_were(
    folder: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("evaluate", str(folder / run), "--model", "demo", *TASK, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    before = read(folder / run / "discovery.json")
    assert facts["kl"] == pytest.approx(before["metric"]["fp32"], abs=1e-5)
    assert facts["edges"] == before["edges"]["kept"]


def test_a_finished_run_stays_as_it_is(folder: Path) -> None:
    before = files_of(folder / "discover")
    assert run_main(*DISCOVER, "--resume", "--out", str(folder / "discover")) == 0
    after = files_of(folder / "discover")
    assert after.pop("circuit.png")  # which was left out there, and is drawn again
    assert after == before


def test_an_interrupted_run_goes_on(folder: Path) -> None:
    """From its journal's first half, without testing an edge of that again."""
    finished = Circuit.from_pretrained(folder / "discover")
    run = folder / "interrupted"
    run.mkdir()
    lines = journal_lines(folder / "discover")
    half = len(lines) // 2
    (run / "journal.jsonl").write_bytes(b"".join(lines[:half]))
    assert run_main(*DISCOVER, "--resume", "--out", str(run)) == 0
    assert unsealed(journal_lines(run))[:half] == unsealed(lines)[:half]
    circuit = Circuit.from_pretrained(run)
    assert np.array_equal(circuit.kept, finished.kept)
    assert np.allclose(circuit.scores, finished.scores, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_search_finds_what_it_found(version: str, tmp_path: Path) -> None:
    before = EARLIER / version / "discover"
    assert run_main(*DISCOVER, "--out", str(tmp_path / "run")) == 0
    ours, theirs = (load_file(path / "scores.safetensors") for path in (tmp_path / "run", before))
    for name in ("exists", "tested", "in_graph"):
        assert np.array_equal(ours[name], theirs[name])
    assert np.allclose(ours["score"], theirs["score"], atol=1e-5, equal_nan=True)


def test_sweeps_load_and_take_more_thresholds(folder: Path) -> None:
    sweep = Sweep.from_pretrained(folder / "sweep")
    assert [row.threshold for row in sweep.rows] == [0.1, 0.3]
    before = {run: files_of(folder / "sweep" / run) for run in ("tau-0.3", "tau-0.1")}
    options = ("--precision", "fp32", "--resume", "--out", str(folder / "sweep"))
    assert run_main("sweep", "demo", *TASK, "--thresholds", "0.3,0.1,0.5", *options) == 0
    after = {run: files_of(folder / "sweep" / run) for run in before}
    assert all(files.pop("circuit.png") for files in after.values())  # drawn again
    assert after == before
    assert len(Sweep.from_pretrained(folder / "sweep").rows) == 3


def test_configurations_load(folder: Path) -> None:
    assert PAHQConfig.from_pretrained(folder / "config") == PAHQConfig(regime="pahq", format="int8")
