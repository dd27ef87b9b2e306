"""Streams that are closed or in ASCII, Ctrl-C before anything is imported, and too little memory to start."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys

import pytest

from pahq_hf.cli.output import print_json, written_output

ENTRY = "import pahq_hf.__main__ as entry, sys\nsys.argv = ['pahq', *sys.argv[1:]]\n"
EARLY = """
import builtins, os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let jobs in the background ignore it
real = builtins.__import__
def importing(name, *rest, **more):
    if name == "typer":
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **more)
builtins.__import__ = importing
"""


def python(code: str, *arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{code}entry.main()\n", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, **how)  # type: ignore[call-overload,no-any-return]


def test_ctrl_c_while_libraries_are_imported_is_one_line() -> None:
    done = python(ENTRY + EARLY, "families", stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "pahq: interrupted\n")


def test_a_closed_stderr_takes_nothing_from_the_exit_code() -> None:
    done = python(ENTRY, "show", "/nowhere", preexec_fn=lambda: os.close(2))
    assert (done.returncode, done.stdout) == (2, "")


def test_too_little_memory_is_said_as_such() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))

    done = python(ENTRY, "info", "demo", stderr=subprocess.PIPE, preexec_fn=limit)
    assert done.returncode in (2, 70)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pahq: ") and "Traceback" not in done.stderr
    assert "memory" in last or "map segment" in last


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_stdout_without_a_character_shows_it_as_python_writes_it(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with written_output():
        sys.stdout.write("τ\ud800 模\n")
    assert raw.getvalue() == rb"\u03c4\ud800 \u6a21" + b"\n"


def test_json_has_no_numbers_that_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    nan, inf = float("nan"), float("inf")
    print_json({"a": nan, "b": [inf, 1.5, {"c": -inf}], "d": (nan,), "e": True, "f": None, "g": "NaN"})
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": None, "b": [None, 1.5, {"c": None}], "d": [None], "e": True, "f": None, "g": "NaN"}
