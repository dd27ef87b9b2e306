"""Sweeps: the circuits of separate runs, their files, and going on after an interruption."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import benchmarks.sweep
import pahq_hf.search.acdc_run
import pahq_hf.search.bench
from pahq_hf import ACDCConfig, Circuit, PAHQConfig, PAHQModel, Sweep, load_task
from pahq_hf.config import EngineConfig
from pahq_hf.errors import CircuitError, ConfigError, MetricError, RunError
from pahq_hf.search.sweep_result import check_thresholds
from tests.helpers import (
    FILES,
    FP32,
    assert_same_circuit,
    files_of,
    id_rows,
    journal_lines,
    run_main,
    save_tiny,
    signalled,
    small_disk,
    wrapped,
    write_rows,
)
from tests.models import random_task
from tests.search.runs import TASK
from tests.tiers import exhaustive

TAUS = (0.02, 0.05, 0.2)
PLOTS = {"pareto.png", "pareto.svg", "pareto.html"}
ALL_FILES = {"sweep.json", "answers.jsonl", *PLOTS, *(f"tau-{tau}/{name}" for tau in TAUS for name in FILES)}


def sweep(model: PAHQModel, out: Path | None = None, **options: Any) -> Sweep:
    return model.sweep(options.pop("task", TASK), out=out, progress=False, **({"thresholds": TAUS} | options))


def alone(model: PAHQModel, tau: float, out: Path | None = None, **options: Any) -> Circuit:
    return model.discover(options.pop("task", TASK), out=out, progress=False, threshold=tau, **options)


def assert_same_circuits(ours: Sweep, theirs: Sweep) -> None:
    assert list(ours) == list(theirs)
    for tau in ours:
        assert_same_circuit(ours[tau], theirs[tau])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sweep of the tiny Llama."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    sweep(wrapped("llama"), folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# -- what it finds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regime", "options"),
    [
        ("fp32", {}),
        exhaustive("rtn", {"engine": EngineConfig("hooks"), "readers": "logits,m*"}),
        exhaustive("pahq", {"margin": 0.5, "absolute": True}),
        ("pahq", {"engine": EngineConfig("hooks"), "readers": "logits,m*"}),
        exhaustive("pahq-literal", {"order": "head", "ablation": "mean", "metric": "kl"}),
        ("pahq", {"screen": "eap-ig:0.5"}),
    ],
)
def test_circuits_are_those_of_separate_runs(regime: Any, options: dict[str, Any]) -> None:
    model = wrapped("llama", regime=regime)
    found = sweep(model, thresholds=TAUS[::-1], **options)
    assert list(found) == list(TAUS) and len(found) == 3
    assert sum(row.reused for row in found.rows) > 0
    for tau, row in zip(TAUS, found.rows, strict=True):
        separate = alone(model, tau, **options)
        assert_same_circuit(found[tau], separate)
        assert found[tau].discovery["second_looks"] == separate.discovery["second_looks"]
        assert row.evaluations <= separate.discovery["evaluations"]
        assert row.evaluations + row.reused >= separate.discovery["evaluations"]


def test_a_screen_is_made_once_and_kept_with_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = pahq_hf.search.acdc_run.make_screen

    def count(*arguments: Any) -> Any:
        made.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(pahq_hf.search.acdc_run, "make_screen", count)
    found = sweep(wrapped("llama"), tmp_path / "out", screen="eap:0.3")
    assert len(made) == 1
    for tau, circuit in found.items():
        assert circuit.discovery["screen"]["survivors"] == round(0.3 * circuit.graph.edge_count)
        separate = tmp_path / str(tau)
        assert_same_circuit(circuit, alone(wrapped("llama"), tau, separate, screen="eap:0.3"))
        ours = tmp_path / "out" / f"tau-{tau}" / "screen.safetensors"
        assert load_file(ours)["score"].tobytes() == load_file(separate / ours.name)["score"].tobytes()


def test_an_interrupted_sweep_goes_on_with_the_screen_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for thresholds whose turn had not come."""
    whole = sweep(wrapped("llama"), tmp_path, screen="eap:0.3")
    (tmp_path / "sweep.json").unlink()
    first, *others = (tmp_path / f"tau-{tau}" for tau in sorted(TAUS, reverse=True))
    (first / "circuit.json").unlink()
    for folder in others:
        shutil.rmtree(folder)
    monkeypatch.setattr(pahq_hf.search.acdc_run, "make_screen", None)
    assert_same_circuits(sweep(wrapped("llama"), tmp_path, screen="eap:0.3", resume=True), whole)


def test_the_demos_circuits_are_those_of_separate_runs() -> None:
    model = PAHQModel.from_pretrained("demo", FP32)
    task = load_task("ioi", model.tokenizer, n=4)
    found = sweep(model, task=task, thresholds=[0.1, 0.02], readers="logits,m*")
    separate = {tau: alone(model, tau, task=task, readers="logits,m*") for tau in found}
    for tau, circuit in separate.items():
        assert_same_circuit(found[tau], circuit)
    counts = [circuit.discovery["evaluations"] for circuit in separate.values()]
    assert found.to_json()["totals"]["evaluations"] < sum(counts)


def test_rows(finished: Path) -> None:
    found = Sweep.from_pretrained(finished)
    judge = wrapped("llama")
    for tau, row in zip(found, found.rows, strict=True):
        circuit = found[tau]
        assert (row.threshold, row.name) == (tau, "logit_diff")
        assert (row.kept, row.live) == (circuit.edge_count, int(circuit.live.sum()))
        assert row.tested == int(circuit.tested.sum())
        report = judge.evaluate(circuit, TASK)
        assert row.metric == pytest.approx(report["metric"]["value"], abs=1e-6)
        assert row.kl == pytest.approx(report["kl"], abs=1e-6)
        assert row.faithfulness == pytest.approx(report["faithfulness"], abs=1e-6)
    assert [row.kept for row in found.rows] == [int(kept.sum()) for kept in found.kept]
    assert found.kept[0].shape == found[TAUS[0]].graph.all_edges.shape
    with pytest.raises(KeyError):
        found[0.123]
    assert "0.05: " in repr(found)


def test_with_kl_no_row_is_measured_twice() -> None:
    for row in sweep(wrapped("llama"), metric="kl").rows:
        assert row.kl == row.metric and row.name == "kl"


# -- files -----------------------------------------------------------------------------------------------


def test_files_of_a_sweep(finished: Path, tmp_path: Path) -> None:
    assert set(files_of(finished)) == ALL_FILES
    for tau in TAUS:  # each is a run's folder, which `discover` takes for its own
        separate = tmp_path / str(tau)
        alone(wrapped("llama"), tau, separate)
        ours = finished / f"tau-{tau}"
        assert journal_lines(ours) == journal_lines(separate)
        for name in ("circuit.json", "scores.safetensors", "means.safetensors"):
            assert (ours / name).read_bytes() == (separate / name).read_bytes()
        assert_same_circuit(alone(wrapped("llama"), tau, ours, resume=True), Circuit.from_pretrained(ours))
        reused = json.loads((ours / "discovery.json").read_text())["reused"]
        assert reused["evaluations"] >= 0 and reused["readers"] >= 0
    document = json.loads((finished / "sweep.json").read_text())
    assert [row["threshold"] for row in document["rows"]] == list(TAUS)
    for name in ("tested", "evaluations", "reused"):
        assert document["totals"][name] == sum(row[name] for row in document["rows"])
    shared = document["seconds"]
    assert set(shared) == {"capture", "judge"}
    assert document["totals"]["seconds"] == pytest.approx(
        sum(shared.values()) + sum(row["seconds"] for row in document["rows"]), abs=1e-3
    )
    assert document == Sweep.from_pretrained(finished).to_json()


def test_a_finished_sweep_is_only_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pahq_hf.search.bench, "make_engine", None)
    before = files_of(copied)
    again = sweep(wrapped("llama"), copied, resume=True)
    assert files_of(copied) == before
    assert_same_circuits(again, Sweep.from_pretrained(copied))


def test_thresholds_can_be_added(copied: Path) -> None:
    found = sweep(wrapped("llama"), copied, thresholds=[*TAUS, 0.03], resume=True)
    assert list(found) == sorted([*TAUS, 0.03])
    assert_same_circuit(found[0.03], alone(wrapped("llama"), 0.03))
    assert found.rows[1].reused > 0
    assert len(json.loads((copied / "sweep.json").read_text())["rows"]) == 4
    with pytest.raises(RunError, match=r"holds a sweep with threshold 0\.03; ask for that too"):
        sweep(wrapped("llama"), copied, resume=True)


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_folder_of_another_sweep_is_refused(copied: Path, unfinished: bool) -> None:
    if unfinished:
        (copied / "sweep.json").unlink()
    before = files_of(copied)
    with pytest.raises(RunError, match=r"holds a sweep already .* continue it with --resume"):
        sweep(wrapped("llama"), copied)
    for changed in ({"metric": "kl"}, {"absolute": True}, {"task": random_task(batch=3, seed=22)}):
        with pytest.raises(RunError, match=r"holds another run: its (metric|absolute|prompts) (is|are)"):
            sweep(wrapped("llama"), copied, resume=True, **changed)
    with pytest.raises(RunError, match="its model has other weights"):
        sweep(wrapped("llama", seed=1), copied, resume=True)
    assert files_of(copied) == before


def test_a_folder_with_other_runs_is_refused(tmp_path: Path) -> None:
    alone(wrapped("llama"), 0.05, tmp_path / "tau-0.05")
    with pytest.raises(RunError, match=r"holds a run already \(circuit\.json\)"):
        sweep(wrapped("llama"), tmp_path)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match="cannot create the output folder"):
            sweep(wrapped("llama"), out)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"rows": [], "totals": {}}', '{"rows": [{}], "totals": {}}']
)
def test_a_damaged_sweep_is_refused(copied: Path, text: str) -> None:
    (copied / "sweep.json").write_text(text)
    with pytest.raises(CircuitError, match=r"sweep\.json"):
        Sweep.from_pretrained(copied)


def test_a_circuit_of_no_sweep_has_no_row() -> None:
    with pytest.raises(CircuitError, match="not one of a sweep"):
        Sweep({0.05: alone(wrapped("llama"), 0.05)}, {})


# -- options ---------------------------------------------------------------------------------------------


def test_thresholds_are_checked() -> None:
    assert check_thresholds([1, 0.5, "0.25"]) == (0.25, 0.5, 1.0)  # type: ignore[list-item]
    assert str(check_thresholds([-0.0])[0]) == "0.0"
    for wrong in ([], [0.1, 0.1], [0.0, -0.0], [-1.0], [float("nan")], [float("inf")], ["a"], [None], 3):
        with pytest.raises(ConfigError, match="threshold"):
            check_thresholds(wrong)  # type: ignore[arg-type]


def test_options_are_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    monkeypatch.setattr(pahq_hf.search.bench, "make_engine", None)
    out = tmp_path / "out"
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "given twice", {"thresholds": [0.1, 0.2, 0.1]}),
        (ConfigError, "at least one threshold", {"thresholds": []}),
        (ConfigError, "thresholds, not a threshold", {"threshold": 0.1}),
        (ConfigError, "not both", {"config": ACDCConfig(), "absolute": True}),
        (ConfigError, "no reader matches", {"readers": "b*"}),
        (ConfigError, "a margin needs precision pahq", {"margin": 0.1}),
        (MetricError, "needs an answer", {"task": replace(TASK, answers=((),) * 3)}),
    ]
    for error, text, options in wrong:
        with pytest.raises(error, match=text):
            sweep(model, out, **options)
    assert not out.exists()


# -- going on --------------------------------------------------------------------------------------------


def cut(folder: Path, records: dict[float, int], answers: int, rest: bytes = b"") -> None:
    """Put a sweep's folder back to a moment: finished readers by threshold, answers; no sweep.json."""
    for name in ("sweep.json", *PLOTS):
        (folder / name).unlink()
    lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "answers.jsonl").write_bytes(b"".join(lines[:answers]) + rest)
    for tau in TAUS:
        run = folder / f"tau-{tau}"
        lines = journal_lines(run)
        shutil.rmtree(run)
        if records.get(tau, -1) >= 0:
            run.mkdir()
            (run / "journal.jsonl").write_bytes(b"".join(lines[: 1 + records[tau]]) + rest)


@pytest.mark.parametrize(
    ("records", "answers", "rest"),
    [
        exhaustive({}, 1, b""),
        exhaustive({0.2: 3}, 12, b'["torn'),
        exhaustive({0.2: 99, 0.05: 0}, 9999, b""),
        ({0.2: 99, 0.05: 8}, 2, b'["torn'),
        exhaustive({0.2: 99, 0.05: 8}, 2, b""),
        exhaustive({0.2: 99, 0.05: 99, 0.02: 2}, 0, b""),
        exhaustive({0.2: 99, 0.05: 99, 0.02: 99}, 9999, b'{"torn'),
    ],
)
def test_a_sweep_goes_on_from_anywhere(
    finished: Path, copied: Path, records: dict[float, int], answers: int, rest: bytes
) -> None:
    cut(copied, records, answers, rest)
    again = sweep(wrapped("llama"), copied, resume=True)
    assert_same_circuits(again, Sweep.from_pretrained(finished))
    assert set(files_of(copied)) == ALL_FILES
    for tau in TAUS:
        assert journal_lines(copied / f"tau-{tau}") == journal_lines(finished / f"tau-{tau}")


def test_it_goes_on_between_evaluations(finished: Path, copied: Path) -> None:
    (copied / "sweep.json").unlink()
    for name in FILES - {"journal.jsonl"}:
        (copied / "tau-0.05" / name).unlink()
    assert_same_circuits(sweep(wrapped("llama"), copied, resume=True), Sweep.from_pretrained(finished))
    (copied / "sweep.json").unlink()
    assert_same_circuits(sweep(wrapped("llama"), copied, resume=True), Sweep.from_pretrained(finished))
    assert set(files_of(copied)) == ALL_FILES


def test_a_full_disk_ends_it_with_one_line(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with small_disk(4000), pytest.raises(RunError, match="cannot write"):
        sweep(wrapped("llama"), out)
    assert_same_circuits(sweep(wrapped("llama"), out, resume=True), Sweep.from_pretrained(finished))


# -- the command line, in processes ----------------------------------------------------------------------


class Scene:
    """A checkpoint of three layers, its task, and the sweep that nobody interrupts."""

    def __init__(self, folder: Path) -> None:
        self.model = save_tiny(folder / "model", "llama", layers=3)
        self.data = write_rows(folder / "task.jsonl", id_rows(random_task(batch=12, length=20, seed=23)))
        self.folder = folder
        assert run_main(*self.arguments("whole")) == 0
        self.whole = Sweep.from_pretrained(folder / "whole")

    def arguments(self, out: str, *more: str) -> list[str]:
        where = ["--task", str(self.data), "--out", str(self.folder / out)]
        return ["sweep", str(self.model), *where, "--thresholds", "0.003,0.0005", "--json", *more]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


def test_kill_9_and_resume(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    out = "killed"
    journal = scene.folder / out / "tau-0.0005" / "journal.jsonl"  # the second of the two
    signalled(scene.arguments(out), journal, 6, signal.SIGKILL)
    assert not (scene.folder / out / "sweep.json").exists()
    assert run_main(*scene.arguments(out)) == 2  # without --resume it is another sweep's folder
    capsys.readouterr()
    assert run_main(*scene.arguments(out, "--resume")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["out"] == str(scene.folder / out)
    assert_same_circuits(Sweep.from_pretrained(scene.folder / out), scene.whole)
    for each in (0.003, 0.0005):
        ours, theirs = (scene.folder / name / f"tau-{each}" for name in (out, "whole"))
        assert journal_lines(ours) == journal_lines(theirs)
        assert (ours / "circuit.json").read_bytes() == (theirs / "circuit.json").read_bytes()


def test_the_command_line_finds_what_python_finds(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    model = PAHQModel.from_pretrained(scene.model, PAHQConfig())
    task = load_task(str(scene.data))
    assert_same_circuit(alone(model, 0.003, task=task), scene.whole[0.003])
    capsys.readouterr()
    arguments = scene.arguments("whole", "--resume")
    arguments.remove("--json")
    assert run_main(*arguments) == 0
    table = capsys.readouterr().out
    for row in scene.whole.rows:
        assert f"{row.kept}" in table and f"{row.threshold:g}" in table


@pytest.mark.parametrize(
    ("thresholds", "text"),
    [
        ("0.1,0.1", "threshold 0.1 is given twice"),
        ("0.1,x", "cannot read the thresholds '0.1,x'; write them like 0.001,0.01"),
        ("", "cannot read the thresholds"),
        ("-1", "thresholds must be numbers >= 0; got -1.0"),
    ],
)
def test_wrong_thresholds_are_one_line(
    tmp_path: Path, thresholds: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--task", "ioi", "--out", str(tmp_path / "out"), f"--thresholds={thresholds}"]
    assert run_main("sweep", str(tmp_path / "no model"), *where) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("pahq: ") and text in captured.err
    assert not (tmp_path / "out").exists()


# -- the benchmark ---------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_benchmark_compares_ways_to_the_same_circuits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.json"
    small = ["demo", "--n=2", "--thresholds=0.5,0.2", "--readers=logits,m3", "--repeats=2", "--no-commands"]
    assert benchmarks.sweep.main([*small, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    ours, theirs = document["ways"]
    assert (ours["name"], theirs["name"]) == ("sweep", "runs")
    assert ours["same"] and theirs["same"] and ours["ratio"] == 1
    assert theirs["ratio"] == pytest.approx(theirs["median"] / ours["median"])
    assert len(ours["seconds"]) == len(theirs["search_seconds"]) == 2
    assert ours["evaluations"] == sum(row["evaluations"] for row in document["rows"])
    assert theirs["evaluations"] == sum(row["separate"] for row in document["rows"])
    assert ours["evaluations"] <= theirs["evaluations"]
    assert "same circuits" in capsys.readouterr().out
    assert benchmarks.sweep.main(["demo", "--thresholds=0.1,0.1"]) == 2
