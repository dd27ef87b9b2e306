"""The benchmarks measure what they say, on problems too small for their times to mean anything."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import acdc_speed, apply_accuracy, growth, methods, random_gpt2, searches
from benchmarks.recording import Recorder, repeat_tests
from benchmarks.rows import ENGINES
from pahq_hf import Circuit, PAHQConfig, PAHQModel, load_task
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.batches import FixedBatch
from tests import helpers
from tests.models import random_task, tiny_llama

SMALL = ("demo", "--n", "2", "--threshold", "0.5", "--sample", "6")


def speed(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The document of a run of acdc_speed on the demo checkpoint."""
    file = tmp_path / "speed.json"
    assert acdc_speed.main([*SMALL, "--json", str(file), *arguments]) == 0
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def check_arithmetic(document: dict[str, Any]) -> None:
    """Figures that follow from others do."""
    forward = document["forward"]["seconds"]
    slow = document["rows"][0]
    assert slow["engine"] == "hooks"
    assert slow["hooks_ratio"] == 1
    for row in document["rows"]:
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"])
        assert row["ms_per_test"] == pytest.approx(1000 * row["seconds"] / row["tests"])
        assert row["acceptance"] == pytest.approx(row["tests"] / row["candidates"])
        assert row["forward_ratio"] == pytest.approx(row["tests"] * forward / row["seconds"])
        assert row["hooks_ratio"] == pytest.approx(slow["ms_per_test"] / row["ms_per_test"])
        assert row["anonymous"] > 0
        if row["engine"] != "speculative":
            assert row["batches"] == row["candidates"] == row["tests"]
            assert row["sample"]["tests"] == 6
            assert row["sample"]["min_ms"] <= row["sample"]["mean_ms"] <= row["sample"]["max_ms"]
            assert row["sample"]["agrees"]
            assert row["sample"]["deviation"] < 1e-5


@pytest.mark.exhaustive
def test_speed_of_whole_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # BF16 products of whole batches and of single tests are not rounded alike.
    anchored = "pahq:compute=fp32"
    regimes = ["--readers", "logits,m3,a3*<v>", "--regimes", f"fp32,{anchored},rtn,pahq-literal"]
    document = speed(tmp_path, *regimes, "--hooks-regimes", f"fp32,{anchored}")
    rows = document["rows"]
    assert [(row["regime"], row["engine"]) for row in rows] == [
        *(("fp32", engine) for engine in ENGINES),
        *((anchored, engine) for engine in ENGINES),
        ("rtn", "sequential"),
        ("rtn", "speculative"),
        ("pahq-literal", "sequential"),
        ("pahq-literal", "speculative"),
    ]
    check_arithmetic(document)
    for row in rows:
        assert row["complete"]
        assert row["same_edges"]
        (fast,) = (r for r in rows if (r["regime"], r["engine"]) == (row["regime"], "speculative"))
        assert (row["kept"], row["tests"]) == (fast["kept"], fast["tests"])
        assert row["final"] == pytest.approx(fast["final"], abs=1e-5)
        assert 0 < row["kept"] < document["graph"]["edges"]
        remeasured = row["evaluations"] - row["candidates"]
        assert remeasured > 1 if row["regime"] in (anchored, "pahq-literal") else remeasured == 1
        if row["engine"] == "speculative":
            assert row["batches"] < row["tests"] <= row["candidates"]
    output = capsys.readouterr().out
    assert all(title in output for title in ("Speed", "Work", "Seconds by phase", "Sampled tests"))


def test_speed_extrapolates_what_would_take_too_long(tmp_path: Path) -> None:
    document = speed(tmp_path, "--regimes", "fp32", "--slow-limit", "0")
    check_arithmetic(document)
    hooks, sequential, speculative = document["rows"]
    assert speculative["complete"]
    for row in (hooks, sequential):
        assert not row["complete"]
        assert row["kept"] is row["final"] is row["evaluations"] is row["same_edges"] is None
        assert row["tests"] == speculative["tests"]
        assert row["phases"]["tests"] == pytest.approx(row["tests"] * row["sample"]["mean_ms"] / 1000)
    assert sequential["phases"]["refresh"] == speculative["phases"]["refresh"]


@pytest.mark.parametrize("size", [1, 7])
def test_a_recorded_run_can_be_visited_at_any_test(size: int) -> None:
    model = PAHQModel(tiny_llama(), helpers.FP32).patched
    task = random_task(model.vocab_size, 3, 7, padding="right", seed=31)
    engine = SparseEngine(model, task, "kl")
    recorder = Recorder(engine)
    state = search(recorder, ACDCConfig(threshold=0.05), batch=FixedBatch(size))
    log, graph = recorder.log, model.graph
    tested = [(graph.writers[t.writer].name, graph.readers[t.reader].name) for t in log.tests]
    assert tested == helpers.tested_in_order(graph, state.records)
    assert len(log.removals) == int((graph.all_edges & ~state.kept).sum())
    for test in log.tests:
        kept = log.kept_before(test)
        assert kept[test.reader, test.writer]
        kept[test.reader, test.writer] = False
        assert abs(engine.metric_of(kept) - test.value) < 1e-5
    sample = repeat_tests(HooksEngine(model, task, "kl"), log, 10, warm=False)
    assert sample.agrees
    assert sample.tests == 10
    assert log.sample(10**6) == log.tests


def test_a_wrong_engine_is_noticed() -> None:
    model = PAHQModel(tiny_llama(), helpers.FP32).patched
    task, other = (random_task(model.vocab_size, 3, 7, seed=seed) for seed in (31, 32))
    recorder = Recorder(SparseEngine(model, task, "kl"))
    search(recorder, ACDCConfig(threshold=0.05))
    assert not repeat_tests(HooksEngine(model, other, "kl"), recorder.log, 5, warm=True).agrees


def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(growth, "Setting", partial(growth.Setting, examples=2, layers=2, width=64))
    file = tmp_path / "growth.json"
    axes = ["--length", "8", "12", "--layers", "1", "2", "--examples", "--width"]
    assert growth.main([*axes, "--sample", "2", "--kept", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(r["axis"], r["setting"][r["axis"]]) for r in rows] == [
        ("length", 8), ("length", 12), ("layers", 1), ("layers", 2)
    ]  # fmt: skip
    for row in rows:
        assert row["agrees"]
        assert 0 < row["kept"] < row["tests"] <= row["edges"]
        assert row["ratio"] == pytest.approx(row["hooks_ms"] / row["sparse_ms"])
    # The length changes neither the graph nor the circuit: times are comparable.
    assert [rows[0][name] for name in ("tests", "kept")] == [rows[1][name] for name in ("tests", "kept")]
    output = capsys.readouterr().out
    assert "against length" in output
    assert "against width" not in output


def test_growth_keeps_the_circuit_it_decided_on() -> None:
    setting = growth.Setting(length=8, examples=2, layers=2, width=32)
    model, task = growth.random_model(setting).patched, growth.random_task(setting)
    circuit = growth.random_circuit(model.graph, 3)
    recorder = growth.Decided(SparseEngine(model, task, "kl"), circuit)
    state = search(recorder, ACDCConfig(threshold=growth.Decided.threshold), batch=FixedBatch(4))
    searched = np.array([bool(row.any()) for row in state.tested])
    np.testing.assert_array_equal(state.kept[searched], circuit[searched])
    assert not state.kept[~searched].any()
    assert len({round(test.value, 9) for test in recorder.log.tests}) > 2  # the engine's own values


def test_random_weights_keep_every_writer_alive(tmp_path: Path) -> None:
    out = tmp_path / "random.json"
    arguments = ["--layers", "2", "--vocab", "300", "--n", "2", "--length", "8", "--readers", "logits"]
    assert random_gpt2.main([*arguments, "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    writers = 1 + 2 * 13
    assert (row["edges"], row["tested"], row["kept"], row["flips"]) == (606, writers, [writers] * 2, 0)
    assert row["exact"] + row["estimated"] == writers
    for name, side in row["sides"].items():
        assert row["ms_per_test"][name] == pytest.approx(1000 * side["cpu"] / writers)
        assert row["x_forward"][name] == pytest.approx(writers * row["forward"] / side["cpu"])
    assert random_gpt2.main([*arguments, "--out", str(out)]) == 0  # `all` is not searched again
    assert json.loads(out.read_text())["sides"]["all"] == row["sides"]["all"]


@pytest.mark.parametrize("benchmark", [acdc_speed, growth])
def test_help_explains_the_figures(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    names = {
        acdc_speed: ("ms/test", "x hooks", "x forward", "acceptance", "batches", "propagation", "refresh"),
        growth: ("edges, tests", "kept", "hooks/sparse", "growth"),
    }
    assert all(f"\n  {name}" in text for name in names[benchmark])


@pytest.mark.parametrize(
    "wrong",
    [["--regimes", "fp16"], ["--engines", ""], ["--sample", "0"], ["--json", "/nowhere/file.json"]],
)
def test_wrong_options_are_refused_before_anything_runs(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        acdc_speed.main(["demo", *wrong])
    assert stop.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert acdc_speed.main(["demo", "--task", "nonsense"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("acdc_speed: ")
    assert error.count("\n") == 1


def test_methods_are_compared_at_equal_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--n", "4", "--tasks", "sva=0.3", "--methods", "acdc", "eap", "random"]
    assert methods.main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["acdc", "eap", "random"]
    assert len({row["edges"] for row in rows.values()}) == 1
    for row in rows.values():  # the K best edges of a method are its circuit
        assert row["faithfulness_at_k"] == pytest.approx(row["faithfulness"], abs=1e-6)
    assert rows["acdc"]["faithfulness"] > 0.5 > rows["random"]["cpr"]
    with pytest.raises(SystemExit, match="2"):  # without acdc nothing says how many edges to keep
        methods.main(["demo", "--methods", "eap", "--out", str(tmp_path)])


def test_searches_are_compared_at_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By prompts that none of them saw; what is kept is not made again."""
    arguments = ["demo", "--tasks", "sva", "--methods", "acdc", "eap/nll", "--edges", "9", "30"]
    arguments += ["--n", "4", "--unseen", "6", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert searches.main(arguments) == 0
    file = tmp_path / "rows.jsonl"
    rows = {row.key: row for row in searches.read_rows(tmp_path)}
    assert len(rows) == len(file.read_text().splitlines()) == 2 * 2 * 3
    model = PAHQModel.from_pretrained("demo", PAHQConfig(regime="fp32"))
    seen, unseen = (
        load_task("sva", model.tokenizer, n=n, seed=s, metric="kl") for n, s in ((4, 1), (6, 1001))
    )
    best = model.attribute(seen, method="eap", metric="nll", topn=30, progress=False)
    row, facts = rows["sva", "eap/nll", 1, 30], model.evaluate(best, unseen, metric="kl")
    assert row.f == pytest.approx(facts["faithfulness"], abs=1e-6)
    assert row.edges == 30 and row.kl == pytest.approx(facts["kl"], abs=1e-6)
    areas = rows["sva", "acdc", 0, 0]
    assert areas.values and areas.cmd_log and areas.cmd and areas.edges > 0
    table, before = capsys.readouterr().out, file.read_bytes()
    assert "eap" in table and "acdc" in table
    assert searches.main(arguments) == 0 and file.read_bytes() == before
    assert capsys.readouterr().out == table


@pytest.mark.exhaustive
def test_acdc_of_a_size_is_that_of_a_threshold(tmp_path: Path) -> None:
    arguments = ["demo", "--tasks", "sva", "--methods", "acdc-sized", "--edges", "15", "30", "--n", "4"]
    assert searches.main([*arguments, "--unseen", "6", "--out", str(tmp_path)]) == 0
    model = PAHQModel.from_pretrained("demo", PAHQConfig(regime="fp32"))
    task = load_task("sva", model.tokenizer, n=4, metric="kl")
    for row in searches.read_rows(tmp_path):
        assert abs(row.edges - row.size) <= 6
        found = Circuit.from_pretrained(searches.folder_of(tmp_path, "sva", "acdc-sized", 0, row.size))
        again = model.discover(task, threshold=found.record.arguments.threshold, progress=False)
        assert np.array_equal(again.kept, found.kept) and found.edge_count == row.edges


def test_what_circuits_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "said.json"
    circuits = ["corrupted:acdc:0.05:eap-ig:0.2", "mean:eap-ig:60"]
    arguments = ["demo", "--tasks", "sva", "--n", "6", "--unseen", "8", "--json", str(file)]
    assert apply_accuracy.main([*arguments, "--circuits", *circuits]) == 0
    by_default, by_mean = json.loads(file.read_text())["rows"]
    assert (by_default["search"], by_mean["search"], by_mean["edges"]) == (*circuits, 60)
    assert f"is {by_default['measured']:.3g}, the full model's" in by_default["warning"]
    assert by_mean["warning"] is None and by_mean["plain"] == by_mean["full"] == 1
    assert by_mean["says"][0] == by_mean["says"][2] and by_mean["same"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {10}
    assert apply_accuracy.main([*arguments, "--circuits", "mean:nothing:4"]) == 2
