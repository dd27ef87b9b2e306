"""The journal of a run: what is torn is measured again, what is damaged or altered is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pahq_hf import ACDCConfig, Circuit
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import RunError
from pahq_hf.search.bench import Bench
from pahq_hf.search.clock import RunClock
from pahq_hf.search.journal import Journal
from pahq_hf.search.replay import record_of, replay, step_of
from pahq_hf.search.state import ReaderRecord
from pahq_hf.search.work import Work
from tests.helpers import FP32, assert_same_circuit, files_of, journal_lines, run_main, unsealed, wrapped
from tests.search.runs import TASK, TAU, discover, interrupted


@pytest.mark.parametrize("cut", [1, 9, 40, -1])
def test_a_torn_last_line_is_measured_again(finished: Path, tmp_path: Path, cut: int) -> None:
    lines = journal_lines(finished)
    folder = interrupted(finished, tmp_path / "torn", 5, lines[6][:cut])
    assert (folder / "journal.jsonl").read_bytes()[-1:] != b"\n"
    circuit = discover(wrapped("llama"), folder, resume=True)
    assert circuit.discovery["resumed_readers"] == 5
    assert_same_circuit(circuit, Circuit.from_pretrained(finished))
    assert journal_lines(folder) == lines


def test_an_empty_journal_starts_anew(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(journal_lines(finished)[0][:30])
    assert_same_circuit(discover(wrapped("llama"), tmp_path, resume=True), Circuit.from_pretrained(finished))
    assert journal_lines(tmp_path) == journal_lines(finished)


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "garbage": lambda lines: [*lines[:3], b"garbage\n", *lines[3:]],
    "an empty line": lambda lines: [*lines[:3], b"\n", *lines[3:]],
    "a record of nothing": lambda lines: [*lines[:3], b"{}\n"],
    "a record that is a list": lambda lines: [*lines[:3], b"[]\n"],
    "a record twice": lambda lines: [*lines[:3], lines[2]],
    "a record missing": lambda lines: [lines[0], *lines[2:5]],
    "edges that do not exist": lambda lines: [
        *lines[:2],
        json.dumps(json.loads(lines[2]) | {"kept": [99]}).encode() + b"\n",
    ],
    "scores of nowhere": lambda lines: [
        *lines[:2],
        json.dumps(json.loads(lines[2]) | {"scores": {"-1": 0.5}}).encode() + b"\n",
    ],
    "a header that is a number": lambda lines: [b"7\n", *lines[1:3]],
    "depth": lambda lines: [lines[0], b"[" * 200_000 + b"\n"],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_journal_is_refused(finished: Path, tmp_path: Path, case: str) -> None:
    raw = b"".join(DAMAGE[case](journal_lines(finished)))
    (tmp_path / "journal.jsonl").write_bytes(raw)
    with pytest.raises(RunError, match=r"journal\.jsonl is damaged .*remove the folder and start anew"):
        discover(wrapped("llama"), tmp_path, resume=True)
    assert files_of(tmp_path) == {"journal.jsonl": raw}


def test_a_journal_that_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    command = ["discover", "demo", "--task", "ioi", "--n", "2", "--threshold", "1", "--resume"]
    assert run_main(*command, "--out", str(tmp_path)) == 2
    assert re.search(r"cannot read .*journal\.jsonl: Is a directory", capsys.readouterr().err)


def first_record(lines: list[bytes], fits: Callable[[dict[str, Any]], bool]) -> int:
    return next(n for n, line in enumerate(lines[1:], start=1) if fits(json.loads(line)))


def altered(lines: list[bytes], number: int, **changes: Any) -> list[bytes]:
    """A journal with one of its records changed."""
    entry = json.loads(lines[number]) | changes
    return [*lines[:number], json.dumps(entry).encode() + b"\n", *lines[number + 1 :]]


def alter_scores(lines: list[bytes], number: int, factor: float, kept: bool) -> list[bytes]:
    """A journal with the scores of the kept or the removed edges of one record changed."""
    entry = json.loads(lines[number])
    scores = {w: s * factor if (int(w) in entry["kept"]) is kept else s for w, s in entry["scores"].items()}
    return altered(lines, number, scores=scores)


def has_kept(entry: dict[str, Any]) -> bool:
    return bool(entry["kept"]) and len(entry["scores"]) > len(entry["kept"])


ALTERED: dict[str, Callable[[list[bytes], int], list[bytes]]] = {
    "a kept edge dropped": lambda lines, n: altered(lines, n, kept=json.loads(lines[n])["kept"][1:]),
    "an edge kept": lambda lines, n: altered(lines, n, kept=sorted(map(int, json.loads(lines[n])["scores"]))),
    "scores of removed edges": lambda lines, n: alter_scores(lines, n, 10.0, kept=False),
    "scores of kept edges below the threshold": lambda lines, n: alter_scores(lines, n, 1e-6, kept=True),
    "a reader not searched": lambda lines, n: altered(lines, n, searched=False),
    "searched, as a text": lambda lines, n: altered(lines, n, searched="true"),
    "no scores": lambda lines, n: altered(lines, n, scores={}, kept=[]),
    "a metric that is no number": lambda lines, n: altered(lines, n, metric=float("nan")),
    "another metric": lambda lines, n: altered(lines, n, metric=json.loads(lines[n])["metric"] + 0.01),
    "a second look": lambda lines, n: altered(lines, n, looks=1),
}
# Where an earlier version's journal has no checksum, this is consistent.
ONLY_SEALED = {"scores of kept edges": lambda lines, n: alter_scores(lines, n, 10.0, kept=True)}


@pytest.mark.parametrize("older", [False, True], ids=["sealed", "older"])
@pytest.mark.parametrize("case", [*ALTERED, *ONLY_SEALED])
def test_an_altered_record_is_named(finished: Path, tmp_path: Path, case: str, older: bool) -> None:
    if older and case in ONLY_SEALED:
        pytest.skip("only a checksum tells")
    lines = journal_lines(finished)
    number = first_record(lines[1:], has_kept) + 1  # not the very first: it is told by what came before, too
    changed = (ALTERED | ONLY_SEALED)[case](lines, number)
    assert changed != lines
    raw = b"".join(unsealed(changed) if older else changed)
    (tmp_path / "journal.jsonl").write_bytes(raw)
    with pytest.raises(
        RunError, match=rf"is damaged \(record {number} on line {number + 1}.*--resume"
    ) as caught:
        discover(wrapped("llama"), tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert files_of(tmp_path) == {"journal.jsonl": raw}


def test_any_bit_of_a_journal_counts(finished: Path, tmp_path: Path) -> None:
    """Whatever is flipped, an error names it, or what was flipped was the end of the last line."""
    header = json.loads(unsealed(journal_lines(finished)[:1])[0])
    bench = Bench(Setting(wrapped("llama").patched, TASK, "logit_diff", "corrupted", FP32))
    raw = b"".join(journal_lines(finished)[:4])
    for place in range(0, len(raw) - 1, 17):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 7
        (tmp_path / "journal.jsonl").write_bytes(bytes(changed))
        with pytest.raises(RunError, match=r"is damaged|holds another run"):
            journal = Journal.resume(tmp_path, header)
            replay(Work(ACDCConfig(TAU), bench, RunClock(), journal=journal), None)


@pytest.mark.parametrize("records", [0, 5])
def test_a_journal_of_an_earlier_version_goes_on_with_a_note(
    finished: Path, tmp_path: Path, records: int, caplog: pytest.LogCaptureFixture
) -> None:
    older = unsealed(journal_lines(finished)[: 1 + records])
    (tmp_path / "journal.jsonl").write_bytes(b"".join(older))
    circuit = discover(wrapped("llama"), tmp_path, resume=True)
    assert "journal.jsonl has no checksums, an earlier version wrote it" in caplog.text
    assert circuit.discovery["resumed_readers"] == records
    assert_same_circuit(circuit, Circuit.from_pretrained(finished))
    lines = journal_lines(tmp_path)
    assert lines[: 1 + records] == older
    assert unsealed(lines) == unsealed(journal_lines(finished))
    assert_same_circuit(discover(wrapped("llama"), tmp_path, resume=True), circuit)
    lines[1 + records] = lines[1 + records].replace(b"searched", b"search3d")  # what was added is sealed
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=f"record {1 + records} on line {2 + records}: its checksum"):
        discover(wrapped("llama"), tmp_path, resume=True)


@pytest.mark.parametrize(
    "options", [{"readers": "logits,m*"}, {"absolute": True}, {"order": "head"}], ids=str
)
def test_a_sound_journal_passes_whatever_the_search(tmp_path: Path, options: dict[str, Any]) -> None:
    model = wrapped("llama", regime="pahq")
    whole = discover(model, tmp_path / "whole", **options)
    half = interrupted(tmp_path / "whole", tmp_path / "half", 9)
    assert_same_circuit(discover(model, half, resume=True, **options), whole)


def test_a_finished_run_that_was_changed_is_not_believed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    circuit = Circuit.from_pretrained(finished)
    circuit.scores[circuit.kept] *= 10
    circuit.save_pretrained(tmp_path / "out")
    with pytest.raises(RunError, match=r"is not the one its journal\.jsonl tells of"):
        discover(wrapped("llama"), tmp_path / "out", resume=True)


def test_a_journal_gives_back_its_records(tmp_path: Path) -> None:
    """To the last bit, in order."""
    header = {"model": "x", "n": 1}
    records = [
        ReaderRecord(5, True, (0, 3), {7: 0.1 + 0.2, 3: -1e-300, 0: 2.0}, 1 / 3),
        ReaderRecord(2, False, (), {}, -0.0),
    ]
    journal = Journal.create(tmp_path, header)
    for record in records:
        journal.append(step_of(record))
    again = Journal.resume(tmp_path, header)
    assert [record_of(step) for step in again.steps] == records
    assert list(record_of(again.steps[0]).scores) == [7, 3, 0]
    with pytest.raises(RunError, match="its n is 1 there, 2 now; choose another folder"):
        Journal.resume(tmp_path, header | {"n": 2})


def test_a_record_is_on_disk_before_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the journal's whole length: a power cut loses nothing that was reported."""
    journal = Journal.create(tmp_path, {})
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    for reader in range(3):
        journal.append(step_of(ReaderRecord(reader, True, (), {0: 0.5}, 1.0)))
        assert synced[reader:] == [journal.path.stat().st_size]
