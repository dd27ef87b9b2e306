"""One process at a time in a run's folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pahq_hf import Circuit
from pahq_hf.circuit.files import LOCK_NAME
from pahq_hf.errors import RunError
from pahq_hf.search.journal import Journal
from pahq_hf.search.lock import RunLock, check_free
from tests.helpers import assert_same_circuit, files_of, journal_lines, run_main, wrapped
from tests.search.runs import TASK

FEW: dict[str, Any] = {"threshold": 0.05, "readers": "logits,m*"}
HOLD = """
import sys, time
from pathlib import Path
from pahq_hf.search.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def discover(out: Path | None = None, **options: Any) -> Circuit:
    return wrapped("llama").discover(TASK, out=out, progress=False, **(FEW | options))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that works in `tmp_path / "out"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def change(folder: Path, **facts: Any) -> None:
    """Alter whose lock it is."""
    document = json.loads((folder / LOCK_NAME).read_text()) | facts
    (folder / LOCK_NAME).write_text(json.dumps(document))


# -- in one folder ---------------------------------------------------------------------------------------


def test_the_second_is_refused_and_the_first_leaves_nothing(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        document = json.loads((tmp_path / LOCK_NAME).read_text())
        assert (document["pid"], document["host"]) == (os.getpid(), socket.gethostname())
        words = (
            f"is in use by process {os.getpid()} on {socket.gethostname()}: wait for it, end it, or choose"
        )
        for enter in (RunLock(tmp_path).__enter__, lambda: check_free(tmp_path)):
            with pytest.raises(RunError, match=words) as caught:
                enter()
            assert "\n" not in str(caught.value)
        with pytest.raises(RunError, match=words):  # of this machine nobody's place is taken
            check_free(tmp_path, take_over=True)
        lock.check()
    assert files_of(tmp_path) == {}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_a_folder_it_made_goes_if_it_is_empty(tmp_path: Path, error: type[BaseException] | None) -> None:
    def work(*files: str) -> None:
        with RunLock(tmp_path / "a" / "b"):
            for name in files:
                (tmp_path / "a" / "b" / name).write_text("")
            if error is not None:
                raise error

    for files in ([], ["file"]):
        if error is None:
            work(*files)
        else:
            with pytest.raises(error):
                work(*files)
        assert (tmp_path / "a").exists() == bool(files)
    assert set(files_of(tmp_path)) == {"a/b/file"}


def test_what_a_killed_process_held_is_free_at_once(other: subprocess.Popen[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match=f"in use by process {other.pid} on"):
        discover(out)
    assert set(files_of(out)) == {LOCK_NAME}
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    (out / f".circuit.png.{other.pid}-0123abcd.tmp").write_text("half a picture")
    circuit = discover(out)
    assert_same_circuit(Circuit.from_pretrained(out), circuit)
    assert not [path for path in files_of(out) if path.startswith(".") or path == LOCK_NAME]


def test_a_finished_run_that_died_over_its_picture_is_tidied(tmp_path: Path) -> None:
    circuit = discover(tmp_path)
    before = files_of(tmp_path)
    with RunLock(tmp_path):
        left = files_of(tmp_path)[LOCK_NAME]
    (tmp_path / LOCK_NAME).write_bytes(left)
    change(tmp_path, started="7")
    (tmp_path / ".circuit.png.999999999-0123abcd.tmp").write_text("half a picture")
    assert_same_circuit(discover(tmp_path, resume=True), circuit)
    assert files_of(tmp_path) == before


STALE: dict[str, Callable[[Path], None]] = {
    "a number used again": lambda folder: change(folder, started="7"),
    "a process that is gone": lambda folder: change(folder, pid=999_999_999),
    "no lock at all": lambda folder: (folder / LOCK_NAME).write_text("garbage"),
    "an empty file": lambda folder: (folder / LOCK_NAME).write_text(""),
    "nobody's": lambda folder: (folder / LOCK_NAME).write_text("{}"),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_lock_is_free(case: str, tmp_path: Path) -> None:
    with RunLock(tmp_path):
        STALE[case](tmp_path)
        with RunLock(tmp_path) as second:
            second.check()


# -- another machine's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", [{"host": "elsewhere"}, {"realm": "another container"}], ids=str)
def test_another_machines_lock_is_free_after_silence_or_when_taken_over(
    facts: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunLock(tmp_path) as first:
        change(tmp_path, **facts)
        with pytest.raises(RunError, match=r"sign of life \d+ seconds ago: .* use --take-over"):
            discover(tmp_path)
        old = time.time() - 3600
        os.utime(tmp_path / LOCK_NAME, (old, old))
        check_free(tmp_path)
        os.utime(tmp_path / LOCK_NAME)
        with RunLock(tmp_path, take_over=True) as second:
            assert "is taken over" in caplog.text
            second.check()
            with pytest.raises(RunError, match="is now that of process"):
                first.check()
    assert files_of(tmp_path) == {}


def test_a_run_whose_place_was_taken_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Journal.append

    def append_and_lose(self: Journal, record: Any) -> None:
        append(self, record)
        if len(self.steps) == 2:
            change(tmp_path, token="another's", host="elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append_and_lose)
        with pytest.raises(RunError, match=r"is now that of process \d+ on elsewhere: this process stops"):
            discover(tmp_path)
    assert len(journal_lines(tmp_path)) == 3
    assert set(files_of(tmp_path)) == {LOCK_NAME, "journal.jsonl"}
    assert_same_circuit(discover(tmp_path, resume=True, take_over=True), discover())


# -- runs ------------------------------------------------------------------------------------------------


def test_no_run_begins_beside_another(other: subprocess.Popen[str], tmp_path: Path) -> None:
    out, model = tmp_path / "out", wrapped("llama")
    rest = {name: value for name, value in FEW.items() if name != "threshold"}
    for run in (
        lambda: discover(out, resume=True),
        lambda: model.attribute(TASK, out=out),
        lambda: model.sweep(TASK, thresholds=[0.1], out=out, progress=False, **rest),
        lambda: model.sweep(TASK, thresholds=[0.1], out=out, resume=True, progress=False, **rest),
    ):
        with pytest.raises(RunError, match=f"in use by process {other.pid}"):
            run()
    assert set(files_of(out)) == {LOCK_NAME}


def test_a_threshold_of_a_sweep_that_somebody_works_on(tmp_path: Path) -> None:
    rest = {name: value for name, value in FEW.items() if name != "threshold"}
    with RunLock(tmp_path / "out" / "tau-0.1"), pytest.raises(RunError, match=r"tau-0\.1 is in use"):
        wrapped("llama").sweep(TASK, thresholds=[0.1, 0.2], out=tmp_path / "out", progress=False, **rest)
    assert not list((tmp_path / "out").rglob(LOCK_NAME))


@pytest.mark.parametrize("command", ["discover", "attribute", "sweep"])
def test_on_the_command_line_it_is_one_line_before_any_work(
    command: str, other: subprocess.Popen[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ["--thresholds", "0.1"] if command == "sweep" else []
    where = [str(tmp_path / "no model"), "--task", "ioi", "--out", str(tmp_path / "out")]
    assert run_main(command, *where, *more) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"pahq: {tmp_path / 'out'} is in use by process {other.pid} on ")


def test_runs_leave_no_lock(tmp_path: Path) -> None:
    rest = {name: value for name, value in FEW.items() if name != "threshold"}
    model = wrapped("llama")
    discover(tmp_path / "run")
    model.attribute(TASK, out=tmp_path / "scores")
    model.sweep(TASK, thresholds=[0.1, 0.2], out=tmp_path / "sweep", progress=False, **rest)
    assert not list(tmp_path.rglob(LOCK_NAME))


def test_a_run_and_a_sweep_do_not_share_a_folder(tmp_path: Path) -> None:
    """Whichever was there first stays as it was, with `resume` and without."""
    model, run, swept = wrapped("llama"), tmp_path / "run", tmp_path / "sweep"
    sweep: dict[str, Any] = FEW | {"thresholds": (0.05,), "progress": False}
    del sweep["threshold"]
    model.sweep(TASK, out=swept, **sweep)
    run.mkdir()
    for name in ("circuit.json", "journal.jsonl"):
        (run / name).write_bytes((swept / "tau-0.05" / name).read_bytes())
        before = files_of(run), files_of(swept)
        for resume in (False, True):
            with pytest.raises(RunError, match=rf"holds a run already \({name}\); choose another folder"):
                model.sweep(TASK, out=run, resume=resume, **sweep)
            for method in (model.discover, model.attribute):
                with pytest.raises(RunError, match=r"holds a sweep already \(sweep\.json\); choose another"):
                    method(TASK, out=swept, resume=resume, progress=False)
        assert (files_of(run), files_of(swept)) == before
        (run / name).unlink()
