"""Outputs that cannot be written: one line on stderr and exit code 2; a reader that is gone: not a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.errors import ConfigError
from tests.helpers import run_main

PAHQ = [sys.executable, "-m", "pahq_hf"]
FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no full device")
@pytest.mark.parametrize("arguments", [["families"], ["families", "--json"], ["discover", "--help"]])
def test_a_full_disk_is_one_line_and_code_2(arguments: list[str]) -> None:
    with FULL.open("w") as full:
        ended = subprocess.run([*PAHQ, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2  # 1 is a circuit that is not confirmed
    assert ended.stderr == f"pahq: cannot write to stdout: {os.strerror(28)}\n"


@pytest.mark.parametrize("arguments", [["families"], ["families", "--json"]])
def test_a_reader_that_is_gone_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run([*PAHQ, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_closed_stdout_is_said() -> None:
    command = f'"{sys.executable}" -m pahq_hf families >&-'
    ended = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (2, "pahq: cannot write to stdout: it is closed\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("output") / "run")
    assert run_main("discover", "demo", "--task", "ioi", "--n", "2", "--threshold", "0.3", "--out", out) == 0
    return out


@pytest.mark.parametrize(
    "command",
    [
        ["discover", "demo", "--task", "ioi", "--n", "2", "--out", ""],
        ["discover", "demo", "--task", "ioi", "--n", "2", "--resume", "--out="],
        ["attribute", "demo", "--task", "ioi", "--n", "2", "--out", ""],
        ["sweep", "demo", "--task", "ioi", "--n", "2", "--thresholds", "0.3", "--out", ""],
        ["evaluate", "RUN", "--model", "demo", "--task", "ioi", "--n", "2", "--curve", "--plots", ""],
        ["show", "RUN", "--html", ""],
        ["show", "RUN", "--svg", ""],
        ["show", "RUN", "--png", ""],
        ["compare", "RUN", "RUN", "--html", ""],
        ["export", "RUN", "--out", ""],
        ["import", "RUN/circuit.json", "--out", ""],
        ["pull", "owner/name", "--out", ""],
    ],
    ids=lambda command: f"{command[0]} {command[-2]}",
)
def test_an_empty_name_is_no_path(
    run: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An unset variable wrote the run into the current folder."""
    monkeypatch.chdir(tmp_path)
    assert run_main(*(word.replace("RUN", run) for word in command)) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "the path of an output is empty" in shown.err
    assert shown.out == "" and not list(tmp_path.iterdir())


def test_an_empty_name_is_no_path_in_python(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PAHQModel.from_pretrained("demo")
    task = load_task("ioi", model.tokenizer, n=2)
    monkeypatch.chdir(tmp_path)
    for act in (
        lambda: model.discover(task, out="", progress=False),
        lambda: model.discover(task, out="", resume=True, progress=False),
        lambda: model.sweep(task, thresholds=[0.3], out="", progress=False),
        lambda: model.attribute(task, out="", progress=False),
        lambda: Circuit.from_pretrained(run).save_pretrained(""),
        lambda: model.pahq_config.save_pretrained(""),
    ):
        with pytest.raises(ConfigError, match="the path of an output is empty"):
            act()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["./nomodel", "/nowhere/nomodel", "../nomodel", "a/b/nomodel"])
def test_a_path_to_no_model_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("discover", name, "--task", "ioi", "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"pahq: cannot read the model {name!r}: there is no such folder"
    )


def test_a_sweep_is_not_one_circuit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "swept")
    where = ["demo", "--task", "ioi", "--n", "2"]
    assert run_main("sweep", *where, "--thresholds", "0.3,0.5", "--out", out) == 0
    for command in (["show", out], ["evaluate", out, "--model", "demo", "--task", "ioi"]):
        capsys.readouterr()
        assert run_main(*command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.endswith("give the folder of a threshold in it, one of tau-0.3, tau-0.5\n")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("command", ["discover", "attribute", "sweep"])
def test_a_taken_folder_is_said_before_a_model_is_loaded(
    command: str, resume: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = ("sweep", "run") if command == "sweep" else ("run", "sweep")
    for what, name in (("run", "circuit.json"), ("sweep", "sweep.json")):
        out = tmp_path / what
        out.mkdir()
        (out / name).write_text("{}")
        where = [command, "./nomodel", "--task", "ioi", "--out", str(out), *(["--resume"] if resume else [])]
        where += ["--thresholds", "0.1"] if command == "sweep" else []
        assert run_main(*where) == 2
        err = capsys.readouterr().err
        if resume and what == own:
            assert "cannot read the model './nomodel'" in err
            continue
        advice = (
            "choose another folder" if what == other else "continue it with --resume or choose another folder"
        )
        assert err == f"pahq: {out} holds a {what} already ({name}); {advice}\n"


def test_what_resume_finds_is_said(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["discover", "demo", "--task", "ioi", "--n", "2", "--threshold", "0.3", "--resume", "--json"]
    where += ["--out"]
    new = str(tmp_path / "new")
    assert run_main(*where, new) == 0
    shown = capsys.readouterr()
    assert f"pahq: no run in {new} yet: starting one\n" in shown.err and shown.out.count("\n") == 1
    assert run_main(*where, run, "--engine", "hooks", "--threads", "1") == 0
    shown = capsys.readouterr()
    said = f"pahq: a finished run in {run} is returned as it is: it needs no --engine and --threads\n"
    assert said in shown.err and shown.out.count("\n") == 1
    assert run_main(*where, run) == 0
    assert "as it is" not in capsys.readouterr().err


def test_what_resume_of_a_sweep_finds_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["sweep", "demo", "--task", "ioi", "--n", "2", "--readers", "logits", "--resume", "--json"]
    where += ["--out", str(tmp_path / "swept"), "--engine", "sparse", "--thresholds"]
    assert run_main(*where, "0.3") == 0
    assert f"pahq: no sweep in {tmp_path / 'swept'} yet: starting one\n" in capsys.readouterr().err
    assert run_main(*where, "0.3") == 0
    said = f"pahq: a finished sweep in {tmp_path / 'swept'} is returned as it is: it needs no --engine\n"
    assert said in capsys.readouterr().err
    assert run_main(*where, "0.3,0.5") == 0  # a threshold more
    assert "as it is" not in capsys.readouterr().err
