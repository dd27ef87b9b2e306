"""An interrupted run ends where an uninterrupted one does, and another run is not continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pahq_hf import Circuit, PAHQModel, Task
from pahq_hf.config import EngineConfig
from pahq_hf.errors import CircuitError, RunError
from tests.helpers import (
    FILES,
    assert_same_circuit,
    files_of,
    journal_lines,
    run_main,
    small_disk,
    unsealed,
    wrapped,
)
from tests.models import random_task
from tests.search.runs import TASK, discover, interrupted
from tests.tiers import quick

# -- going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", quick([1, 6], 6))
def test_resuming_at_any_reader_gives_the_same_run(finished: Path, tmp_path: Path, step: int) -> None:
    whole = Circuit.from_pretrained(finished)
    for records in range(0, len(journal_lines(finished)), step):
        folder = interrupted(finished, tmp_path / str(records), records)
        circuit = discover(wrapped("llama"), folder, resume=True)
        assert circuit.discovery["resumed_readers"] == records
        assert_same_circuit(circuit, whole)
        assert_same_circuit(Circuit.from_pretrained(folder), whole)
        assert journal_lines(folder) == journal_lines(finished)
        assert set(files_of(folder)) == FILES


def test_what_a_continued_run_computes_in_lasts_for_that_run_alone(tmp_path: Path) -> None:
    model, out = wrapped("llama", regime="pahq"), tmp_path / "run"
    auto = model.pahq_config.compute
    other = "bf16" if auto == "fp32" else "fp32"
    whole, before = discover(wrapped("llama", regime="pahq", compute=other), out), discover(model)
    assert_same_circuit(discover(model, out, resume=True), whole)
    assert model.pahq_config.compute == auto
    assert_same_circuit(discover(model), before)
    with pytest.raises(RunError, match="another run"):
        discover(model, out, resume=True, threshold=0.5)
    assert model.pahq_config.compute == auto
    assert_same_circuit(discover(model), before)


def test_the_engine_changes_no_decision_and_may_change_on_the_way(finished: Path, tmp_path: Path) -> None:
    """One run by each engine, and one that goes from each to the other."""
    model, sparse = wrapped("llama"), Circuit.from_pretrained(finished)
    slow, fast = EngineConfig(engine="hooks"), EngineConfig(engine="sparse", batch=3)
    hooks = discover(model, tmp_path / "hooks", engine=slow)
    assert (sparse.discovery["engine"], hooks.discovery["engine"]) == ("sparse", "hooks")
    assert hooks.discovery["evaluations"] == hooks.discovery["edges"]["tested"] + 1
    for records in (3, 8, 15):
        folder = interrupted(tmp_path / "hooks", tmp_path / f"same{records}", records)
        assert_same_circuit(discover(model, folder, engine=slow, resume=True), hooks)
    there = interrupted(tmp_path / "hooks", tmp_path / "there", 7)
    back = interrupted(finished, tmp_path / "back", 7)
    others = [
        discover(model, there, engine=fast, resume=True),
        discover(model, back, engine=slow, resume=True),
    ]
    for other in (hooks, *others):
        assert np.array_equal(other.kept, sparse.kept)
        assert np.array_equal(other.tested, sparse.tested)
        assert np.abs(other.scores - sparse.scores).max() < 1e-5
        assert other.discovery["metric"]["final"] == pytest.approx(
            sparse.discovery["metric"]["final"], abs=1e-5
        )


def test_a_run_that_died_while_saving_is_completed(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    (folder / "circuit.json").unlink()
    (folder / "scores.safetensors").write_bytes(b"of a writer that was not atomic")
    circuit = discover(wrapped("llama"), folder, resume=True)
    assert_same_circuit(Circuit.from_pretrained(folder), circuit)
    assert_same_circuit(circuit, Circuit.from_pretrained(finished))


def test_resuming_a_finished_run_does_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("the model ran")

    before = files_of(finished)
    times = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    monkeypatch.setattr(nn.Module, "__call__", forbidden)
    circuit = discover(wrapped("llama"), finished, resume=True)
    assert_same_circuit(circuit, Circuit.from_pretrained(finished))
    assert files_of(finished) == before
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == times


def test_resuming_where_there_is_no_run_starts_one(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    circuit = discover(wrapped("llama"), tmp_path, resume=True)
    assert_same_circuit(circuit, Circuit.from_pretrained(finished))
    assert circuit.discovery["resumed_readers"] == 0
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_full_disk_stops_the_run_and_leaves_it_resumable(finished: Path, tmp_path: Path) -> None:
    lines = journal_lines(finished)
    # Room for the header, two records and half of the third.
    with (
        small_disk(len(b"".join(lines[:3])) + len(lines[3]) // 2),
        pytest.raises(RunError, match="cannot write"),
    ):
        discover(wrapped("llama"), tmp_path / "out")
    assert set(files_of(tmp_path / "out")) - {"seconds.json"} == {"journal.jsonl"}
    circuit = discover(wrapped("llama"), tmp_path / "out", resume=True)
    assert circuit.discovery["resumed_readers"] == 2
    assert_same_circuit(circuit, Circuit.from_pretrained(finished))
    assert journal_lines(tmp_path / "out") == lines


@pytest.mark.parametrize("regime", quick(["pahq", "pahq-literal", "rtn"], "pahq"))
def test_low_precision_runs_resume_too(tmp_path: Path, regime: Any) -> None:
    model = wrapped("llama", regime=regime)
    whole = discover(model, tmp_path / "whole", order="head")
    for records in (1, 6, 13):
        folder = interrupted(tmp_path / "whole", tmp_path / str(records), records)
        assert_same_circuit(discover(model, folder, resume=True, order="head"), whole)


# -- other runs are refused ------------------------------------------------------------------------------

OTHER: dict[str, tuple[Callable[[], PAHQModel], Task, dict[str, Any], str]] = {
    "weights": (lambda: wrapped("llama", seed=1), TASK, {}, "model has other weights"),
    "family": (lambda: wrapped("mistral"), TASK, {}, "model has other weights"),
    "groups": (lambda: wrapped("llama_split"), TASK, {}, "split kv groups is false there, true now"),
    "dtype": (lambda: wrapped("llama", dtype=torch.float64), TASK, {}, "dtype is float32 there, float64 now"),
    "precision": (lambda: wrapped("llama", regime="rtn"), TASK, {}, "precision is fp32 there, rtn now"),
    "prompts": (
        lambda: wrapped("llama"),
        random_task(seed=22, metric="logit_diff"),
        {},
        "prompts are others",
    ),
    "answers": (
        lambda: wrapped("llama"),
        replace(TASK, answers=((1,), (2,), (3,))),
        {},
        "prompts are others: the data or the tokenizer",
    ),
    "threshold": (lambda: wrapped("llama"), TASK, {"threshold": 0.06}, "threshold is 0.05 there, 0.06 now"),
    "metric": (lambda: wrapped("llama"), TASK, {"metric": "kl"}, "metric is logit_diff there, kl now"),
    "order": (lambda: wrapped("llama"), TASK, {"order": "head"}, "order is acdc there, head now"),
    "ablation": (
        lambda: wrapped("llama"),
        TASK,
        {"ablation": "zero"},
        "ablation is corrupted there, zero now",
    ),
    "readers": (lambda: wrapped("llama"), TASK, {"readers": "logits"}, "readers is none there, logits now"),
    "sign": (lambda: wrapped("llama"), TASK, {"absolute": True}, "absolute is false there, true now"),
}


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("done", [True, False], ids=["finished", "interrupted"])
def test_another_run_is_not_continued(finished: Path, tmp_path: Path, case: str, done: bool) -> None:
    folder = finished if done else interrupted(finished, tmp_path / "half", 4)
    before = files_of(folder)
    model, task, options, what = OTHER[case]
    with pytest.raises(RunError, match=f"holds another run: its {what}.*; choose another folder"):
        discover(model(), folder, task, resume=True, **options)
    assert files_of(folder) == before


@pytest.mark.parametrize("done", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("older", [True, False])
def test_other_prompts_are_told_apart(tmp_path: Path, older: bool, done: bool) -> None:
    """By what the user chose, where it is known; journals of earlier versions do not know it."""
    model, source = wrapped("llama"), {"generator": "made", "n": 3, "seed": 21}
    task = replace(TASK, source=source)
    folder = tmp_path / "out"
    before = discover(model, folder, task)
    if not done:
        lines = journal_lines(folder)[:5]
        folder = tmp_path / "half"
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(b"".join(lines))
    if older and not done:
        header, *records = unsealed(journal_lines(folder))
        old = {key: value for key, value in json.loads(header).items() if key != "data"}
        (folder / "journal.jsonl").write_bytes(json.dumps(old).encode() + b"\n" + b"".join(records))
    other = replace(random_task(batch=4, seed=22, metric="logit_diff"), source=source | {"n": 4, "seed": 22})
    told = r"\(n 3 there, 4 now; seed 21 there, 22 now\)"
    told = ": another task, --n, --seed or data" if older and not done else f" {told}"
    with pytest.raises(RunError, match=f"its prompts are others{told}; choose another folder"):
        discover(model, folder, other, resume=True)
    same = replace(task, source={"generator": "renamed"})  # a note, not what pins the run
    assert_same_circuit(discover(model, folder, same, resume=True), before)


def test_a_folder_with_a_run_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    for name in ("circuit.json", "discovery.json", "journal.jsonl"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        shutil.copy(finished / name, folder / name)
        with pytest.raises(RunError, match=rf"holds a run already \({name}\); continue it with --resume"):
            discover(wrapped("llama"), folder)
        assert set(files_of(folder)) == {name}


@pytest.mark.parametrize("name", ["means.safetensors", "scores.safetensors"])
def test_a_finished_run_that_lost_a_file_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    (folder / name).unlink()
    with pytest.raises(CircuitError, match=rf"{name} is missing: discovery\.json lists it"):
        discover(wrapped("llama"), folder, resume=True)
    for command in (["show", str(folder)], ["evaluate", str(folder), "--model", "demo", "--task", "ioi"]):
        assert run_main(*command) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"{name} is missing" in last and "remove circuit.json and --resume" in last
    (folder / "circuit.json").unlink()  # as it says
    again = discover(wrapped("llama"), folder, resume=True)
    assert_same_circuit(again, Circuit.from_pretrained(finished))
    assert set(files_of(folder)) == FILES
