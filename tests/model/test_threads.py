"""Threads: how many, what they may change, and what a resumed run takes over from its journal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pahq_hf.precision.threads
from pahq_hf import Circuit, PAHQConfig, PAHQModel, load_task
from pahq_hf.config import EngineConfig
from pahq_hf.errors import ConfigError
from pahq_hf.precision.threads import Cores, cpu_quota, find_cores, sleep_while_waiting, take_threads, threads
from pahq_hf.search.settings import RunSettings
from tests.helpers import id_rows, journal_lines, run_main, save_tiny, wrapped, write_rows
from tests.models import random_task

TASK = random_task(batch=3, seed=21, metric="logit_diff")


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """Give the other tests their threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- how many -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "free"),
    [
        (Cores(usable=8, total=8, busy=0.2), 8),
        (Cores(usable=8, total=8, busy=5.4), 3),
        (Cores(usable=2, total=16, busy=3.0), 2),
        (Cores(usable=2, total=2, busy=11.5), 1),
    ],
)
def test_cores_that_others_use_are_not_free(cores: Cores, free: int) -> None:
    assert cores.free == free


def test_a_load_that_is_over_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([(100, 1000), (100, 1020)])
    monkeypatch.setattr(pahq_hf.precision.threads, "_worked", lambda: next(ticks))
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 7.0, 7.0))
    assert find_cores().busy == 0.0


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/box/inner", {"box/cpu.max": "150000 100000", "box/inner/cpu.max": "max 100000"}, 1.5),
        ("0::/", {"cpu.max": "400000 100000"}, 4.0),
        ("0::/box", {"box/cpu.max": "max 100000"}, None),
        ("0::/box", {}, None),
        (
            "3:cpu,cpuacct:/box",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "50000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_quota_of_control_groups(
    tmp_path: Path, line: str, files: dict[str, str], quota: float | None
) -> None:
    own = tmp_path / "own"
    own.write_text(f"{line}\n")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(f"{text}\n")
    assert cpu_quota(tmp_path / "root", own) == quota


def test_who_decides_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for, then the environment, then the run, then what is free."""
    monkeypatch.setattr(pahq_hf.precision.threads, "find_cores", lambda: Cores(usable=2, total=8, busy=7.0))
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (take_threads(4, 2), torch.get_num_threads()) == (4, 4)
    torch.set_num_threads(3)
    assert take_threads(None, 2) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert take_threads(None, 2) == 2
    assert take_threads(None, 16) == 2, "no more than this process may use"
    assert take_threads() == 1


@pytest.mark.parametrize("count", [99_999, 2**31, 2**70])
def test_more_threads_than_a_machine_can_use_are_refused(
    count: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """99,999 ended the process with a segmentation fault, in libraries that no exception reaches."""
    with pytest.raises(ConfigError, match=f"threads must be at least 1 and at most .*; got {count}$"):
        EngineConfig(threads=count)
    out = str(tmp_path / "out")
    for command in ("discover", "attribute", "sweep"):
        more = ["--thresholds", "0.1"] if command == "sweep" else []
        where = ["demo", "--task", "ioi", "--out", out, *more, "--threads", str(count)]
        assert run_main(command, *where) == 2
        error = capsys.readouterr().err
        assert error.startswith("pahq: threads must be") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_few_threads_for_each_core_are_allowed() -> None:
    assert EngineConfig(threads=4).threads == 4
    assert EngineConfig(threads=64).threads == 64


def test_threads_sleep_unless_somebody_chose() -> None:
    assert sleep_while_waiting({}) == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert sleep_while_waiting({"OMP_WAIT_POLICY": "ACTIVE"}) == {}
    assert sleep_while_waiting({"GOMP_SPINCOUNT": "10"}) == {}


def test_threads_are_given_back() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError), threads(3):
        assert torch.get_num_threads() == 3
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2
    with pytest.raises(ConfigError, match=r"threads must be at least 1 and .*; got 0"):
        EngineConfig(threads=0)


def test_info_says_how_many_there_would_be(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    assert run_main("info", "demo", "--json") == 0
    facts = json.loads(capsys.readouterr().out)["threads"]
    assert facts["count"] >= 1 and facts["cores"] == os.cpu_count() and facts["busy"] >= 0
    assert "=" in facts["waiting"] and torch.get_num_threads() == before


# -- what they change -----------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["pahq", "fp32"])
def test_one_circuit_whatever_the_threads(regime: Any) -> None:
    model = PAHQModel.from_pretrained("demo", PAHQConfig(regime=regime))
    task = load_task("ioi", model.tokenizer, n=8)
    options: dict[str, Any] = {"threshold": 0.05, "readers": "logits,m*,a3*", "progress": False}
    torch.set_num_threads(1)
    found = [model.discover(task, **options, engine=EngineConfig(threads=count)) for count in (1, 2, 4)]
    assert torch.get_num_threads() == 1
    assert [circuit.discovery["settings"]["threads"] for circuit in found] == [1, 2, 4]
    for circuit in found[1:]:
        assert np.array_equal(circuit.kept, found[0].kept)
        assert np.allclose(circuit.scores, found[0].scores, rtol=1e-3, atol=1e-6)


# -- what a resumed run takes over ----------------------------------------------------------------------


def begun(folder: Path, records: int, **changes: Any) -> Path:
    """Cut a run's journal, and change or (by None) take out entries of its header.

    Checksums go: a journal may have none.
    """
    for path in folder.iterdir():
        if path.name != "journal.jsonl":
            path.unlink()
    entries = [json.loads(line) for line in journal_lines(folder)[: 1 + records]]
    entries[0] = {key: value for key, value in (entries[0] | changes).items() if value is not None}
    text = "".join(json.dumps({k: v for k, v in e.items() if k != "check"}) + "\n" for e in entries)
    (folder / "journal.jsonl").write_text(text)
    return folder


def test_a_resumed_run_computes_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(pahq_hf.precision.threads, "find_cores", lambda: Cores(usable=4, total=4, busy=0.0))
    model, rows, out = save_tiny(tmp_path / "model"), tmp_path / "ids.jsonl", tmp_path / "out"
    write_rows(rows, id_rows(TASK))
    command = ["discover", str(model), "--task", str(rows), "--threshold", "0.05", "--out", str(out)]
    assert run_main(*command, "--threads", "2", "--engine", "hooks") == 0
    whole = Circuit.from_pretrained(out)
    compute = whole.discovery["precision"]["compute"]
    ran = {"threads": 2, "engine": "hooks", "device": "cpu", "compute": compute}
    assert json.loads(journal_lines(out)[0])["settings"] == ran == whole.discovery["settings"]
    assert run_main(*command, "--resume") == 0, "a finished run is finished"

    begun(out, 4)
    assert run_main(*command, "--resume") == 0
    resumed = Circuit.from_pretrained(out)
    assert resumed.discovery["settings"] == ran and resumed.edges == whole.edges

    begun(out, 4)
    assert run_main(*command, "--resume", "--threads", "1", "--engine", "sparse") == 0
    other = Circuit.from_pretrained(out)
    assert other.discovery["settings"] == ran | {"threads": 1, "engine": "sparse"}
    assert np.array_equal(other.kept, whole.kept)

    begun(out, 4, settings=None)  # of an earlier version
    assert RunSettings.of_run(out).threads is None
    assert run_main(*command, "--resume") == 0
    assert Circuit.from_pretrained(out).discovery["settings"]["engine"] == "sparse"


def test_a_run_that_began_on_a_device_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {"settings": {"threads": 1, "device": "cuda:97", "engine": "sparse", "compute": "fp32"}}
    (tmp_path / "journal.jsonl").write_text(json.dumps(header) + "\n")
    command = ["discover", "demo", "--task", "ioi", "--out", str(tmp_path), "--resume"]
    assert run_main(*command) == 2
    line = capsys.readouterr().err
    assert (
        "began on device 'cuda:97', which cannot be used here" in line
        and "--device continues it elsewhere" in line
    )


@pytest.mark.parametrize("began", ["fp32", "bf16"])
def test_auto_products_are_what_they_were_when_the_run_began(tmp_path: Path, began: Any) -> None:
    options: dict[str, Any] = {"threshold": 0.05, "progress": False, "out": tmp_path}
    whole = wrapped("llama", regime="pahq", compute=began).discover(TASK, **options)
    begun(tmp_path, 4)
    auto = PAHQModel(wrapped_hf(), PAHQConfig(compute="auto"))
    resumed = auto.discover(TASK, resume=True, **options)
    assert resumed.discovery["precision"]["compute"] == began
    assert np.array_equal(resumed.kept, whole.kept) and np.array_equal(resumed.scores, whole.scores)
    assert auto.discover(TASK, resume=True, **options).edges == whole.edges, "a finished run is finished"


def wrapped_hf() -> Any:
    from tests.families import ALL_FAMILIES

    return ALL_FAMILIES["llama"](dtype=torch.float32, layers=2, seed=0)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]\n", '{"settings": [1], "precision": 3}\n', '{"settings": {}}\n']
)
def test_of_a_damaged_journal_nothing_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal.jsonl").write_text(text)
    assert RunSettings.of_run(tmp_path) == RunSettings()
    wrong = {"threads": True, "engine": "steam", "device": 3}
    (tmp_path / "journal.jsonl").write_text(json.dumps({"settings": wrong}) + "\n")
    assert RunSettings.of_run(tmp_path) == RunSettings()
