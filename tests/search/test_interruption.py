"""Runs killed or interrupted in real processes, and what `--resume` makes of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pahq_hf import Circuit, PAHQModel, load_task
from tests.forked import Ended
from tests.helpers import (
    FILES,
    FP32,
    assert_same_circuit,
    files_of,
    id_rows,
    journal_lines,
    named,
    referee,
    run_main,
    save_tiny,
    signalled,
    write_rows,
)
from tests.models import random_task

# A warning before it says that random weights know no answers.
INTERRUPTED = "pahq: interrupted; a discovery's journal is kept: continue it with --resume"

# -- real processes ----------------------------------------------------------------------------------------


class Scene:
    """A checkpoint of three layers, its task, and the run that nobody interrupts.

    The task is large enough for the run to take seconds: a signal must find it at work.
    """

    def __init__(self, folder: Path) -> None:
        self.model = save_tiny(folder / "model", "llama", layers=3)
        self.data = write_rows(folder / "task.jsonl", id_rows(random_task(batch=8, length=16, seed=30)))
        self.folder = folder
        assert run_main(*self.arguments("whole")) == 0
        self.whole = Circuit.from_pretrained(folder / "whole")

    def arguments(self, out: str, *more: str) -> list[str]:
        where = ["--task", str(self.data), "--out", str(self.folder / out)]
        return ["discover", str(self.model), *where, "--threshold", "0.0005", "--json", *more]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


def stopped(scene: Scene, out: str, number: signal.Signals) -> Ended:
    """What the run leaves when it is signalled after a few readers."""
    journal = scene.folder / out / "journal.jsonl"
    ended = signalled(scene.arguments(out), journal, 4, number)
    assert journal.read_bytes().count(b"\n") < 1 + len(scene.whole.graph.readers)
    return ended


def resumed(scene: Scene, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Continue on the command line, and compare with the run that nobody interrupted."""
    capsys.readouterr()
    assert run_main(*scene.arguments(out, "--resume")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["resumed_readers"] >= 3
    folder = scene.folder / out
    assert_same_circuit(Circuit.from_pretrained(folder), scene.whole)
    assert journal_lines(folder) == journal_lines(scene.folder / "whole")
    assert (folder / "circuit.json").read_bytes() == (scene.folder / "whole" / "circuit.json").read_bytes()
    assert set(files_of(folder)) == FILES


def test_kill_9_and_resume(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = stopped(scene, "killed", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert stdout == ""
    left = set(files_of(scene.folder / "killed"))
    assert left - {"seconds.json"} == {"journal.jsonl", "run.lock"}
    assert run_main(*scene.arguments("killed")) == 2  # without --resume it is another run's folder
    resumed(scene, "killed", capsys)


def test_interrupt_and_resume(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, stderr = stopped(scene, "interrupted", signal.SIGINT)
    assert code == 130
    assert stdout == ""
    assert stderr.splitlines()[-1] == INTERRUPTED
    assert set(files_of(scene.folder / "interrupted")) - {"seconds.json"} == {"journal.jsonl"}
    resumed(scene, "interrupted", capsys)


def test_terminate_and_resume(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """As a scheduler or a shutdown ends it."""
    code, stdout, stderr = stopped(scene, "terminated", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert stdout == ""
    assert stderr.splitlines()[-1] == INTERRUPTED
    assert set(files_of(scene.folder / "terminated")) - {"seconds.json"} == {"journal.jsonl"}
    resumed(scene, "terminated", capsys)


def test_the_command_line_runs_what_python_runs(scene: Scene) -> None:
    model = PAHQModel.from_pretrained(scene.model)
    task = load_task(str(scene.data))
    circuit = model.discover(task, threshold=0.0005, progress=False)
    assert_same_circuit(circuit, scene.whole)


def test_in_fp32_it_is_what_the_referee_finds(scene: Scene) -> None:
    rows = write_rows(scene.folder / "few.jsonl", id_rows(random_task(batch=4, length=9, seed=23)))
    task = load_task(str(rows))
    circuit = PAHQModel.from_pretrained(scene.model, FP32).discover(task, threshold=0.02, progress=False)
    judge = referee("llama", task, layers=3)
    assert named(circuit.graph, circuit.kept) == judge.acdc(0.02).kept


@pytest.mark.parametrize("command", ["discover", "sweep"])
@pytest.mark.parametrize("left", [False, True])
def test_a_journal_is_named_only_where_there_is_one(
    command: str,
    left: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Interrupted while the model is loaded: before a journal is begun, or with an earlier one."""
    out = tmp_path / "out"

    def interrupted(*_: object, **__: object) -> None:
        if left:
            folder = out if command == "discover" else out / "tau-0.1"
            folder.mkdir(parents=True)
            (folder / "journal.jsonl").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(PAHQModel, "from_pretrained", interrupted)
    option = "--threshold" if command == "discover" else "--thresholds"
    assert run_main(command, "demo", "--task", "ioi", "--out", str(out), option, "0.1") == 130
    rest = "; a discovery's journal is kept: continue it with --resume" if left else ""
    assert capsys.readouterr().err.splitlines()[-1] == f"pahq: interrupted{rest}"
