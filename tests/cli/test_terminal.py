"""Nothing in models, data and circuits steers the terminal."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pahq_hf import Circuit
from pahq_hf.circuit.card import render_card
from pahq_hf.circuit.render.notebook import circuit_html
from pahq_hf.circuit.render.page import circuit_page, compare_page
from pahq_hf.circuit.render.plots_page import Figure, PageTable, plots_page
from pahq_hf.circuit.terminal import Terminated, ending, printable, printable_notes, terminable
from pahq_hf.cli.output import keeps_journal, print_rich
from pahq_hf.cli.tables import facts_table
from tests.circuit.test_circuit import small
from tests.helpers import id_rows, run_main, write_rows
from tests.models import random_task

EVIL = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m\u202egnp.exe\r\x00\x08"
SEEN = r"\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m\u202egnp.exe"


def steering(text: str) -> set[str]:
    """Characters of a text that a terminal might obey."""
    controls = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")}
    return (controls | {letter for letter in text if letter in "\u202e\u2066\u200f"}) - {"\n", "\t"}


def evil() -> Circuit:
    circuit = small(
        task={"name": EVIL, "examples": 1, EVIL: EVIL},
        metric={"name": EVIL, "full": 0.0},
        precision={"regime": EVIL},
        arguments={"threshold": 0.1, "screen": EVIL},
        method=EVIL,
        versions={EVIL: EVIL},
    )
    circuit.model = {"base_model": EVIL, "revision": EVIL}
    return circuit


def test_printable() -> None:
    assert printable(EVIL) == SEEN + r"\r\x00\x08"
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("Ünïcödé 模型 ‖ τ 👩\u200d🔬") == "Ünïcödé 模型 ‖ τ 👩\u200d🔬"
    assert printable("\udcff") == r"\udcff"  # of a file name that is no UTF-8
    for number in range(sys.maxunicode + 1):
        assert not steering(printable(chr(number)))


@pytest.mark.parametrize("command", ["show", "compare"])
def test_tables(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil().save_pretrained(tmp_path / "run")
    folders = [str(tmp_path / "run")] * (2 if command == "compare" else 1)
    assert run_main(command, *folders) == 0
    out, err = capsys.readouterr()
    assert out and not steering(out + err)
    if command == "show":
        assert r"\x1b]0;owned" in out


@pytest.mark.parametrize(
    "written",
    [
        render_card,
        circuit_page,
        circuit_html,
        lambda circuit: compare_page(circuit, circuit),
        lambda circuit: plots_page(EVIL, [Figure(EVIL, [], {})], PageTable([EVIL], [[EVIL]])),
    ],
    ids=["card", "page", "notebook", "comparison", "plots"],
)
def test_files_for_people(written: Callable[[Circuit], str]) -> None:
    """`cat` of them steers nothing, and what was in a name can be seen."""
    text = written(evil())
    shown = text.split("<script>")[0]  # Plotly's own source is no text of ours
    assert r"\x1b]0;owned" in shown.replace("\\\\", "\\").replace("\\]", "]") and not steering(shown)


def test_a_data_file_with_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its name to the card, as users meet it."""
    rows = write_rows(tmp_path / "a\x1bcb\x1b]0;T\x07\u202e.jsonl", id_rows(random_task(batch=2, seed=3)))
    out = tmp_path / "out"
    options = ("--precision", "fp32", "--readers", "logits", "--out", str(out))
    assert run_main("discover", "demo", "--task", str(rows), *options) == 0
    card = (out / "README.md").read_text()
    assert "a\\\\x1bcb" in card and not steering(card)
    assert run_main("export", str(out), "--format", "dot", "--out", str(tmp_path / "a.dot")) == 0
    assert not steering((tmp_path / "a.dot").read_text())


def test_a_table_of_anything(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title=EVIL, caption=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    print_rich(table, facts_table({EVIL: EVIL}))
    assert not steering(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", EVIL.replace("\x00", "")],
        ["show", "x", f"--{EVIL}"],
        [EVIL],
        ["info", EVIL.replace("\x00", "")],
        ["families", EVIL],
        ["sweep", "demo", "--task", "ioi", "--out", "out", "--thresholds", EVIL],
    ],
)
def test_errors(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and r"\x1b" in err and not steering(err)
    assert err.splitlines()[-1].startswith("pahq: ")


def test_what_a_damaged_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small().save_pretrained(tmp_path)
    document = json.loads((tmp_path / "circuit.json").read_text())
    document["edges"][EVIL] = {"score": 1.0, "in_graph": True}
    (tmp_path / "circuit.json").write_text(json.dumps(document))
    assert run_main("show", str(tmp_path)) == 2
    err = capsys.readouterr().err
    assert "is not an edge of this model's graph" in err and not steering(err)


def test_notes(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    small().save_pretrained(tmp_path)
    document = json.loads((tmp_path / "circuit.json").read_text())
    document["cfg"][EVIL] = 1
    (tmp_path / "circuit.json").write_text(json.dumps(document))
    assert run_main("show", str(tmp_path)) == 0
    assert "unknown keys in cfg" in caplog.text and not steering(caplog.text + capsys.readouterr().err)


def test_notes_of_libraries(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory(), warnings.formatwarning
    with printable_notes():
        logging.getLogger("some.library").warning("\x1b[1mbold\x1b[0m %s", EVIL)
        shown = warnings.formatwarning(EVIL, UserWarning, "file", 1)
    assert "bold " in caplog.text and not steering(caplog.text)
    assert not steering(shown)
    assert (logging.getLogRecordFactory(), warnings.formatwarning) == before


# -- signals ---------------------------------------------------------------------------------------------


def test_a_signal_to_end_runs_what_cleans_up(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    left: list[Any] = []
    with pytest.raises(Terminated) as caught, terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            left.append("cleaned")
    assert caught.value.number == signal.SIGTERM and left == ["cleaned"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_it_at_once_and_what_is_ignored_stays_so() -> None:
    code = """
import os, signal, sys
from pahq_hf.circuit.terminal import terminable
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with terminable():
    os.kill(os.getpid(), signal.SIGHUP)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    finally:
        print("cleaning", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (-signal.SIGTERM, "cleaning\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_error_that_a_library_puts_in_the_place_of_a_signal(
    number: signal.Signals, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Safetensors does, when a signal comes while it calls Python."""
    if number == signal.SIGINT:  # a shell lets jobs in the background ignore it, and what they start
        request.addfinalizer(partial(signal.signal, number, signal.getsignal(number)))
        signal.signal(number, signal.default_int_handler)

    @keeps_journal
    def command(out: Path) -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except (Terminated, KeyboardInterrupt):
            raise ValueError("could not determine the shape") from None

    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(Terminated) as caught, terminable():
        command(out=tmp_path)
    assert (caught.value.number, caught.value.kept) == (number, True)
    assert ending() is None
