"""Whole runs: what they write, and that an interrupted one ends where an uninterrupted one does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pahq_hf.search.bench
from pahq_hf import ACDCConfig, Circuit, PAHQModel, Task
from pahq_hf.capture.recording import answer_logits
from pahq_hf.circuit.verdict import faithfulness
from pahq_hf.config import EngineConfig
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import CircuitError, ConfigError, MetricError, RunError
from pahq_hf.search.acdc import ReaderRecord
from pahq_hf.search.bench import Bench
from pahq_hf.search.clock import RunClock
from pahq_hf.search.journal import Journal
from pahq_hf.search.replay import record_of, replay, step_of
from pahq_hf.search.work import Work
from tests.helpers import (
    FILES,
    FP32,
    assert_same_circuit,
    files_of,
    journal_lines,
    named,
    referee,
    run_main,
    small_disk,
    unsealed,
    wrapped,
)
from tests.models import FAMILIES, random_task

TASK = random_task(batch=3, seed=21, metric="logit_diff")
TAU = 0.05


def discover(model: PAHQModel, out: Path | None = None, task: Task = TASK, **options: Any) -> Circuit:
    return model.discover(task, out=out, progress=False, **({"threshold": TAU} | options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the tiny Llama."""
    folder = tmp_path_factory.mktemp("run") / "out"
    discover(wrapped("llama"), folder)
    return folder


def interrupted(finished: Path, folder: Path, records: int, rest: bytes = b"") -> Path:
    """A copy of a run as it stood after so many readers."""
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(b"".join(journal_lines(finished)[: 1 + records]) + rest)
    return folder


# -- what a run writes ----------------------------------------------------------------------------------


def test_files_of_a_run(finished: Path) -> None:
    assert set(files_of(finished)) == FILES
    circuit = Circuit.from_pretrained(finished)
    graph = circuit.graph
    document = json.loads((finished / "circuit.json").read_text())
    assert list(document) == ["cfg", "nodes", "edges"]
    assert document["edges"] == {n: {"score": s, "in_graph": True} for n, s in circuit.edges}
    assert document["nodes"] == {n: {"in_graph": True} for n in circuit.nodes}
    assert document["cfg"]["model_type"] == "llama" and document["cfg"]["d_model"] == 32
    facts = json.loads((finished / "discovery.json").read_text())
    assert {"edges", "evaluations", "seconds", "peak_memory", "metric", "versions", "arguments"} <= set(facts)
    assert {"total", "tested", "untested", "kept"} <= set(facts["edges"])
    assert facts["edges"]["total"] == graph.edge_count == 82
    assert facts["edges"]["tested"] == int(circuit.tested.sum())
    assert facts["edges"]["tested"] + facts["edges"]["untested"] == graph.edge_count
    assert facts["edges"]["kept"] == circuit.edge_count > 0
    assert facts["edges"]["live"] == int(circuit.live.sum())
    assert facts["evaluations"] >= facts["edges"]["tested"] + 1
    assert facts["second_looks"] == {"margin": None, "tests": 0, "changed": 0}
    assert {"name", "full", "empty", "final", "final_recomputed", "tolerance", "fp32"} == set(facts["metric"])
    assert facts["verified"] is True
    seconds = facts["seconds"]
    assert seconds["total"] >= seconds["search"] > 0 and seconds["capture"] > 0
    assert facts["peak_memory"]["rss"] > 10_000_000
    assert all(isinstance(value, int) for value in facts["peak_memory"].values())
    assert facts["arguments"]["threshold"] == TAU and facts["arguments"]["metric"] == "logit_diff"
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["device"] == "cpu"
    assert facts["task"]["examples"] == 3
    lines = journal_lines(finished)
    assert len(lines) == 1 + len(graph.readers)
    assert "tested" in (finished / "README.md").read_text()


def test_a_run_finds_what_the_referee_finds(finished: Path) -> None:
    circuit = Circuit.from_pretrained(finished)
    judge = referee("llama", TASK, metric="logit_diff")
    expected = judge.acdc(TAU)
    assert named(circuit.graph, circuit.kept) == expected.kept
    assert named(circuit.graph, circuit.graph.all_edges & ~circuit.tested) == expected.untested
    for edge, score in expected.scores.items():
        r, w = circuit.graph.parse_edge("->".join(edge))
        assert circuit.scores[r, w] == pytest.approx(score, abs=1e-5)
    metric = circuit.discovery["metric"]
    assert metric["full"] == pytest.approx(judge.metric(set()), abs=1e-5)
    assert metric["empty"] == pytest.approx(judge.metric(judge.edge_set), abs=1e-5)
    for name in ("final", "final_recomputed", "fp32"):
        assert metric[name] == pytest.approx(expected.final, abs=1e-5)


def test_what_is_returned_is_what_is_saved(tmp_path: Path) -> None:
    circuit = discover(wrapped("gpt2"), tmp_path / "out", metric="kl", order="head")
    again = Circuit.from_pretrained(tmp_path / "out")
    assert_same_circuit(again, circuit)
    assert again.discovery == json.loads(json.dumps(circuit.discovery))
    assert again.discovery["metric"]["full"] == pytest.approx(0, abs=1e-9)
    assert circuit.model["base_model"]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    circuit = discover(wrapped("llama"))
    assert circuit.edge_count and not list(tmp_path.iterdir())


@pytest.mark.parametrize("regime", ["fp32", "pahq", "pahq-literal", "rtn"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_quoted_metric_is_that_of_the_circuit_in_fp32(name: str, regime: Any) -> None:
    """Whatever the search saw; and the search in low precision without anchors saw something else."""
    circuit = discover(wrapped(name, regime=regime), metric="kl")
    judge = referee(name, TASK)
    removed = judge.edge_set - named(circuit.graph, circuit.kept)
    metric = circuit.discovery["metric"]
    assert metric["fp32"] == pytest.approx(judge.metric(removed), abs=1e-5)
    assert metric["empty"] == pytest.approx(judge.metric(judge.edge_set), abs=1e-5)
    assert metric["full"] == pytest.approx(0, abs=1e-9)
    gap = abs(metric["final_recomputed"] - metric["fp32"])
    if regime in ("fp32", "pahq"):
        assert metric["final"] == pytest.approx(metric["fp32"], abs=1e-6)
        assert gap < 1e-6
    else:
        assert gap > 1e-4
    if regime == "rtn":
        assert metric["final"] == pytest.approx(metric["final_recomputed"], abs=1e-6)
    precision = circuit.discovery["precision"]
    assert precision["regime"] == regime
    memory = circuit.discovery["peak_memory"]
    low = memory["linear_weights"] < 0.5 * memory["linear_weights_fp32"]
    assert low == (regime != "fp32")


@pytest.mark.parametrize("fmt", ["int8", "bf16"])
def test_other_formats(fmt: Any) -> None:
    circuit = discover(wrapped("llama", regime="rtn", fmt=fmt), metric="kl")
    judge = referee("llama", TASK)
    removed = judge.edge_set - named(circuit.graph, circuit.kept)
    assert circuit.discovery["metric"]["fp32"] == pytest.approx(judge.metric(removed), abs=1e-5)
    assert circuit.discovery["precision"]["format"] == fmt


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_reach_search_and_evaluation(ablation: Any) -> None:
    circuit = discover(wrapped("llama", dtype=torch.float64), ablation=ablation)
    judge = referee("llama", TASK, metric="logit_diff", ablation=ablation)
    expected = judge.acdc(TAU)
    assert named(circuit.graph, circuit.kept) == expected.kept
    assert circuit.discovery["metric"]["fp32"] == pytest.approx(expected.final, abs=1e-9)
    assert circuit.discovery["metric"]["empty"] == pytest.approx(judge.metric(judge.edge_set), abs=1e-9)


def test_a_run_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = wrapped("llama", regime="pahq-literal")
    before = answer_logits(model.patched, TASK, TASK.clean_ids)
    size = model.patched.precision.nbytes
    discover(model)
    assert torch.equal(answer_logits(model.patched, TASK, TASK.clean_ids), before)
    assert model.patched.precision.nbytes == size


def test_options_are_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    monkeypatch.setattr(pahq_hf.search.bench, "make_engine", None)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="threshold must be a finite number >= 0"):
        discover(model, out, threshold=-1)
    with pytest.raises(ConfigError, match="no reader matches"):
        discover(model, out, readers="logits,b*")
    with pytest.raises(ConfigError, match="no option 'tau'"):
        discover(model, out, tau=1)
    with pytest.raises(ConfigError, match="not both"):
        model.discover(TASK, config=ACDCConfig(), threshold=1.0)
    with pytest.raises(MetricError, match="needs an answer"):
        discover(model, out, task=replace(TASK, answers=((),) * 3))
    assert not out.exists()


# -- going on -------------------------------------------------------------------------------------------


def test_resuming_at_any_reader_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    whole = Circuit.from_pretrained(finished)
    for records in range(len(journal_lines(finished))):
        folder = interrupted(finished, tmp_path / str(records), records)
        circuit = discover(wrapped("llama"), folder, resume=True)
        assert circuit.discovery["resumed_readers"] == records
        assert_same_circuit(circuit, whole)
        assert_same_circuit(Circuit.from_pretrained(folder), whole)
        assert journal_lines(folder) == journal_lines(finished)
        assert set(files_of(folder)) == FILES


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


@pytest.mark.parametrize("regime", ["pahq", "pahq-literal", "rtn"])
def test_the_hooks_engine_decides_the_same_in_low_precision(regime: Any) -> None:
    model = wrapped("llama", regime=regime, compute="fp32")
    sparse, hooks = (discover(model, engine=EngineConfig(engine=name)) for name in ("sparse", "hooks"))
    assert np.array_equal(hooks.kept, sparse.kept)
    assert np.abs(hooks.scores - sparse.scores).max() < 1e-5
    assert hooks.discovery["second_looks"] == sparse.discovery["second_looks"]
    for name in ("final", "final_recomputed", "fp32"):
        ours, theirs = hooks.discovery["metric"][name], sparse.discovery["metric"][name]
        assert ours == pytest.approx(theirs, abs=1e-5)


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


@pytest.mark.parametrize("regime", ["pahq", "pahq-literal", "rtn"])
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


# -- judging a circuit ------------------------------------------------------------------------------------


def test_faithfulness() -> None:
    assert faithfulness(0.5, 0.0, 2.0) == 0.75
    assert faithfulness(-3.0, -1.0, 1.0) == 2.0  # better than the full model
    assert faithfulness(1.0, 1.0, 1.0) is None


def test_evaluation_takes_the_circuits_own_metric_and_ablation() -> None:
    model = wrapped("llama", dtype=torch.float64)
    circuit = discover(model, metric="prob_diff", ablation="mean")
    facts = model.evaluate(circuit, TASK)
    judge = referee("llama", TASK, metric="prob_diff", ablation="mean")
    removed = judge.edge_set - named(circuit.graph, circuit.kept)
    assert facts["metric"]["name"] == "prob_diff"
    assert facts["metric"]["value"] == pytest.approx(judge.metric(removed), abs=1e-9)
    assert facts["metric"]["empty"] == pytest.approx(judge.metric(judge.edge_set), abs=1e-9)
    full, empty = judge.metric(set()), judge.metric(judge.edge_set)
    assert facts["faithfulness"] == pytest.approx((judge.metric(removed) - empty) / (full - empty), abs=1e-6)
    assert facts["kl"] == pytest.approx(referee("llama", TASK, ablation="mean").metric(removed), abs=1e-9)


def test_an_unknown_ablation_in_a_circuit_file_is_refused() -> None:
    circuit = discover(wrapped("llama"))
    circuit.discovery["arguments"]["ablation"] = "noise"
    with pytest.raises(ConfigError, match=r"ablation must be one of corrupted, .*; got 'noise'"):
        wrapped("llama").evaluate(circuit, TASK)


# -- folders that cannot be written -----------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("below", ["file/out", "file", "x" * 300])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, below: str, resume: bool) -> None:
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(RunError, match="cannot create the output folder"):
        discover(wrapped("llama"), tmp_path / below, resume=resume)
    assert files_of(tmp_path) == {"file": b"a regular file"}


def test_nan_leaves_no_folder(tmp_path: Path) -> None:
    """The poisoned token stands in a prompt of the task, and not in those of the check at load."""
    hf = FAMILIES["llama"]()
    with torch.no_grad():
        hf.get_input_embeddings().weight[int(TASK.clean_ids[0, -1])] = float("nan")
    model = PAHQModel(hf, FP32)
    with pytest.raises(MetricError, match="came out as nan"):
        discover(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
