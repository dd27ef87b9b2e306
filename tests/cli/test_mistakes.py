"""Every mistake is one line on stderr and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pahq_hf import Circuit
from pahq_hf.errors import PAHQError
from tests.cli.world import Result, World, one_process, only_json
from tests.helpers import files_of, run_main
from tests.models import VOCAB

# Command and what its line must say. `out` is a folder that must not exist afterwards.
Bad = dict[str, tuple[Callable[[World], list[str]], str]]
BAD: Bad = {
    # models
    "no such folder": (lambda w: w.discover("nowhere"), "nowhere"),
    "no such Hub model": (lambda w: ["info", "no-such/model"], "cannot read the model 'no-such/model'"),
    "not even a name": (lambda w: ["info", "a b/c?d"], "a b/c?d"),
    "an unsupported family": (lambda w: ["info", w.path("bert")], "family 'bert' is not supported"),
    "an unsupported family in discover": (lambda w: w.discover("bert"), "family 'bert' is not supported"),
    "an unknown family": (lambda w: ["info", w.path("novel")], "cannot tell the family of"),
    "a truncated checkpoint": (lambda w: w.discover("short"), "cannot read the checkpoint file"),
    "a missing tensor": (lambda w: w.discover("less"), "it lacks 1 tensors, such as model.layers.1.mlp"),
    "no weights": (lambda w: w.discover("bare"), "cannot load the weights"),
    "NaN in the final norm": (lambda w: w.discover("norm"), "NaN"),
    "NaN for one token": (lambda w: w.discover("token"), "metric kl came out as nan"),
    "NaN in evaluate": (lambda w: w.evaluate("run", "token", "--any-weights"), "metric kl came out as nan"),
    # data
    "no such file": (lambda w: w.discover("model", "nothing.jsonl"), "nothing.jsonl: no such file"),
    "too many examples": (
        lambda w: [*w.discover("nowhere"), "--task", "ioi", "--n", "100000000"],  # before the model is read
        "at most 100,000 examples",
    ),
    "no such task": (lambda w: [*w.discover(), "--task", "juggling"], "unknown task 'juggling'"),
    "no data": (lambda w: w.discover("model", "empty.jsonl"), "the dataset is empty"),
    "a missing column": (lambda w: w.discover("words", "column.jsonl"), "missing column corrupted"),
    "different lengths": (lambda w: w.discover("model", "lengths.jsonl"), "example 0: the clean prompt"),
    "different lengths of texts": (lambda w: w.discover("words", "texts.jsonl"), "example 1: the clean"),
    "an answer of two tokens": (lambda w: w.discover("words", "several.jsonl"), "'Mary John' is 2 tokens"),
    "texts without tokenizer": (lambda w: w.discover("model", "texts.jsonl"), "a tokenizer is needed"),
    "a generated task without tokenizer": (lambda w: [*w.discover(), "--task", "ioi"], "pass the model's"),
    "not JSON": (lambda w: w.discover("model", "broken.jsonl"), "line 1: not valid JSON"),
    "an unknown token": (lambda w: w.discover("model", "vocabulary.jsonl"), f"token id {VOCAB}"),
    "no answers for the metric": (
        lambda w: w.discover("model", "answers.jsonl", "--metric", "logit_diff"),
        "metric logit_diff needs an answer for every example",
    ),
    "no answers in evaluate": (
        lambda w: w.evaluate("run", "model", "--metric", "nll", task="answers.jsonl"),
        "metric nll needs an answer for every example",
    ),
    # options
    "threshold nan": (
        lambda w: w.discover("model", "ids.jsonl", "--threshold", "nan"),
        "threshold must be a finite number",
    ),
    "threshold below 0": (lambda w: w.discover("model", "ids.jsonl", "--threshold=-1"), "threshold must be"),
    "infinite threshold": (lambda w: w.discover("model", "ids.jsonl", "--threshold=inf"), "a finite number"),
    "threshold of letters": (lambda w: w.discover("model", "ids.jsonl", "--threshold", "low"), "--threshold"),
    "a glob of nothing": (
        lambda w: w.discover("model", "ids.jsonl", "--readers", "logits,q*"),
        "no reader matches 'q*'; readers are named like",
    ),
    "an unknown order": (lambda w: w.discover("model", "ids.jsonl", "--order", "random"), "--order"),
    "an unknown metric": (lambda w: w.discover("model", "ids.jsonl", "--metric", "loss"), "--metric"),
    "an unknown precision": (lambda w: w.discover("model", "ids.jsonl", "--precision", "fp4"), "--precision"),
    "an unknown format": (lambda w: w.discover("model", "ids.jsonl", "--format", "fp4"), "--format"),
    "an unknown active": (lambda w: w.discover("model", "ids.jsonl", "--active", "writer"), "--active"),
    "an unknown compute": (lambda w: w.discover("model", "ids.jsonl", "--compute", "fp4"), "--compute"),
    "a margin below 0": (lambda w: w.discover("model", "ids.jsonl", "--margin=-1"), "margin must be"),
    "margin nan": (lambda w: w.discover("model", "ids.jsonl", "--margin", "nan"), "margin must be"),
    "a margin in FP32": (
        lambda w: w.discover("model", "ids.jsonl", "--precision", "fp32", "--margin", "0.1"),
        "a margin needs precision pahq",
    ),
    "active writers in FP32": (
        lambda w: w.discover("model", "ids.jsonl", "--precision", "fp32", "--active", "both"),
        "active=both needs precision pahq",
    ),
    "BF16 products in another regime": (
        lambda w: w.discover("model", "ids.jsonl", "--precision", "rtn", "--compute", "bf16"),
        "compute=bf16 needs precision pahq",
    ),
    "FP8 products of other weights": (
        lambda w: w.discover("model", "ids.jsonl", "--format", "int8", "--compute", "fp8"),
        "compute=fp8 needs format fp8",
    ),
    "an unknown ablation": (lambda w: w.discover("model", "ids.jsonl", "--ablation", "none"), "--ablation"),
    "an unknown engine": (lambda w: w.discover("model", "ids.jsonl", "--engine", "steam"), "--engine"),
    "an empty batch": (lambda w: w.discover("model", "ids.jsonl", "--batch", "0"), "batch"),
    "a budget of words": (lambda w: w.discover("model", "ids.jsonl", "--memory-budget", "much"), "much"),
    "a budget of nothing": (lambda w: w.discover("model", "ids.jsonl", "--memory-budget=0"), "budget"),
    "no examples": (lambda w: w.discover("model", "ids.jsonl", "--n", "0"), "--n"),
    "an unknown option": (lambda w: w.discover("model", "ids.jsonl", "--tau", "1"), "--tau"),
    "an unknown command": (lambda w: ["find"], "find"),
    "no output folder": (lambda w: ["discover", w.path("model"), "--task", "ioi"], "--out"),
    "no model": (lambda w: ["info"], "MODEL"),
    "an unknown device": (lambda w: w.discover("model", "ids.jsonl", "--device", "abacus"), "'abacus'"),
    "a device that is not there": (
        lambda w: w.discover("model", "ids.jsonl", "--device", "cuda:77"),
        "device 'cuda:77' cannot be used",
    ),
    "low precision in float64": (
        lambda w: w.discover("model", "ids.jsonl", "--dtype", "float64", "--precision", "rtn"),
        "low-precision regimes need",
    ),
    "the default in float64": (
        lambda w: w.discover("model", "ids.jsonl", "--dtype", "float64"),
        "low-precision regimes need",
    ),
    # folders
    "a folder below a file": (lambda w: w.discover(out="file/out"), "cannot create the output folder"),
    "a file as folder": (lambda w: w.discover(out="file"), "cannot create the output folder"),
    "a name too long": (lambda w: w.discover(out="x" * 300), "cannot create the output folder"),
    "a folder with a run": (lambda w: w.discover(out="run"), "holds a run already (circuit.json); continue"),
    "a folder with half a run": (lambda w: w.discover(out="half"), "holds a run already (journal.jsonl)"),
    "resuming another run": (
        lambda w: w.discover("model", "ids.jsonl", "--resume", out="half"),
        "holds another run: its threshold is",
    ),
    "resuming another finished run": (
        lambda w: w.discover("model", "ids.jsonl", "--resume", out="run"),
        "holds another run: its threshold is",
    ),
    # circuits
    "no circuit": (lambda w: ["show", w.path("model")], "circuit.json"),
    "no folder": (lambda w: ["show", w.path("nowhere")], "nowhere"),
    "a damaged circuit.json": (lambda w: ["show", w.path("damaged_circuit")], "circuit.json is damaged"),
    "damaged scores": (lambda w: ["show", w.path("damaged_scores")], "its checksum is not that in"),
    "a damaged discovery.json": (lambda w: w.evaluate("damaged_discovery"), "discovery.json is damaged"),
    "edges that do not exist": (lambda w: w.evaluate("unnamed"), "->logit' is not an edge of"),
    "a circuit of other groups": (lambda w: w.evaluate("gpt2_run"), "kv_groups=4, the model has kv_groups=2"),
    "a circuit of fewer layers": (lambda w: w.evaluate("run", "deep"), "layers=2, the model has layers=3"),
    "a circuit of another family": (lambda w: w.evaluate("run", "qwen2"), "is llama, the model's is qwen2"),
    "evaluate on missing data": (lambda w: w.evaluate(task="nothing.jsonl"), "no such file"),
    "evaluate without a model": (lambda w: ["evaluate", w.path("run"), "--task", "ioi"], "--model"),
}  # fmt: skip
REPORTED = {"a missing tensor"}  # transformers lists what is missing first


# What else runs in that process: a command's answer is all it prints.
FINE: dict[str, Callable[[World], list[str]]] = {
    "info": lambda w: ["info", w.path("bare"), "--json"],
    "discover": lambda w: w.discover("model", "ids.jsonl", "--threshold=0.05", "--json", out="fine/own"),
}


@pytest.fixture(scope="module")
def untouched(world: World) -> dict[str, bytes]:
    """All files before any of the commands ran, apart from what fine commands write."""
    return outside_fine(world)


def outside_fine(world: World) -> dict[str, bytes]:
    return {name: raw for name, raw in files_of(world.root).items() if not name.startswith("fine")}


@pytest.fixture(scope="module")
def results(
    world: World, untouched: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    """What every command of `BAD` and `FINE` left."""
    cases = {name: command(world) for name, (command, _) in BAD.items()}
    cases |= {f"fine: {name}": command(world) for name, command in FINE.items()}
    return one_process(tmp_path_factory.mktemp("driver"), cases)


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(results: dict[str, Result], name: str) -> None:
    code, out, err = results[name]
    assert code == 2, err
    assert out == ""
    if name in REPORTED:
        err = err[err.rindex("\npahq: ") + 1 :]
    assert err.startswith("pahq: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert BAD[name][1] in err
    assert "Traceback" not in err
    assert len(err) < 500


def test_mistakes_leave_nothing_behind(
    world: World, untouched: dict[str, bytes], results: dict[str, Result]
) -> None:
    assert outside_fine(world) == untouched
    assert not (world.root / "out").exists()


@pytest.mark.parametrize("name", FINE)
def test_nothing_but_the_answer_is_printed(results: dict[str, Result], name: str) -> None:
    """By libraries and their threads neither, once they are loaded for the first time."""
    assert only_json(results[f"fine: {name}"])["edges"]


def test_the_bare_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main() == 2
    captured = capsys.readouterr()
    assert "Usage:" in captured.out and "discover" in captured.out
    assert captured.err == ""


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reports of errors go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_bug_has_an_exit_code_and_a_report_of_its_own(
    monkeypatch: pytest.MonkeyPatch, world: World, capsys: pytest.CaptureFixture[str], reports: Path
) -> None:
    """1 would say that a run is finished, 2 that somebody typed something wrong."""

    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("all edges\nare gone")

    monkeypatch.setattr(Circuit, "from_pretrained", bug)
    said = "pahq: internal error, please report it: ZeroDivisionError: all edges"
    assert run_main("show", world.path("run"), "--json", "--token", "hf_secret") == 70
    captured = capsys.readouterr()
    (report,) = reports.glob("pahq-*.log")
    assert captured.out == "" and captured.err == f"{said}; {report} has what to send\n"
    text = report.read_text()
    assert f"pahq show {world.path('run')} --json --token ***\n" in text and "hf_secret" not in text
    assert "in bug" in text and "ZeroDivisionError: all edges" in text and "transformers 5." in text
    assert report.stat().st_mode & 0o077 == 0
    report.unlink()
    monkeypatch.setenv("PAHQ_TRACEBACK", "1")
    assert run_main("show", world.path("run"), "--json", "--token=hf_secret") == 70
    captured = capsys.readouterr()
    assert "Traceback (most recent call last)" in captured.err and "in bug" in captured.err
    (report,) = reports.glob("pahq-*.log")
    assert captured.out == "" and captured.err.endswith(f"{said}; {report} has what to send\n")
    assert "hf_secret" not in report.read_text()


class PanicException(BaseException):
    """As libraries in Rust raise it."""


ENDS: dict[str, tuple[BaseException, int, str]] = {
    "no memory": (MemoryError("Unable to allocate 9 TiB"), 2, "memory ran out (Unable to allocate 9 TiB)"),
    "no memory for torch": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        2,
        "memory ran out",
    ),
    "no memory for a library": (ImportError("x.so: failed to map segment from shared object"), 2, "memory"),
    "no memory for the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "memory ran out"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "is full: no room for /x/y"),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "the disk is full"),
    "a panic in Rust": (PanicException("called `Option::unwrap()`"), 70, "PanicException: called `Option"),
    "the end of a file": (EOFError(), 70, "internal error, please report it: EOFError"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), 70, "RecursionError"),
    "a message of 100 kB": (PAHQError("begins " + "x" * 100_000 + " ends"), 2, "xxx ends"),
    "a message that steers": (PAHQError("\x1b[2J\ud800\u202e"), 2, r"\x1b[2J\ud800\u202e"),
    "a message of many lines": (PAHQError("one\n\ntwo"), 2, "pahq: one two"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_whatever_ends_a_command_is_one_line(
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reports: Path,
) -> None:
    error, code, words = ENDS[case]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Circuit, "from_pretrained", fail)
    assert run_main("show", "anything") == code
    out, err = capsys.readouterr()
    err = err.lstrip("\n")  # click ends the line of a prompt that it takes for there
    assert out == "" and err.startswith("pahq: ") and err.count("\n") == 1
    assert words in err and len(err) < 1100
    assert len(list(reports.glob("pahq-*.log"))) == (code == 70)


def test_a_report_that_cannot_be_written_is_not_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Circuit, "from_pretrained", bug)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert run_main("show", "anything") == 70
    assert capsys.readouterr().err == (
        "pahq: internal error, please report it: ZeroDivisionError: ZeroDivisionError\n"
    )


def test_an_interrupt_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: World
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Circuit, "from_pretrained", interrupt)
    assert run_main("show", world.path("run")) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pahq: interrupted") and captured.err.count("\n") == 1
