"""What is said while a run takes long, and whether it is true."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.circuit.terminal import is_watched
from pahq_hf.engine.setting import Setting
from pahq_hf.search.attribution.scoring import edge_scores
from pahq_hf.search.bench import Bench
from pahq_hf.search.clock import RunClock
from pahq_hf.search.expectation import ExpectedTests
from pahq_hf.search.journal import Journal, Step
from pahq_hf.search.progress import Bars, Lines, Silence, make_progress
from pahq_hf.search.replay import record_of
from pahq_hf.search.state import ReaderRecord, Search
from tests.helpers import FP32, files_of, wrapped
from tests.search.runs import TASK

# -- lines ----------------------------------------------------------------------------------------------


class Time:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_file_gets_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    with Lines(clock).count("ACDC", "test", total=5_000, done=1_000) as count:
        for _ in range(100):
            clock.now += 1
            count.advance(20)
        count.expect(4_000)
        count.note(kept=7)
        clock.now += 20
        count.advance(0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "pahq: ACDC: 1,600 of about 5,000 tests, about 2 min 50 s to go",
        "pahq: ACDC: 2,200 of about 5,000 tests, about 2 min 20 s to go",
        "pahq: ACDC: 2,800 of about 5,000 tests, about 1 min 50 s to go",
        "pahq: ACDC: 3,000 of about 4,000 tests, about 1 min 0 s to go, kept 7",
        "pahq: ACDC: 3,000 tests in 2 min 0 s, kept 7",
    ]


def test_a_phase_is_worth_a_line_once_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines(patience=60).phase("capturing"):
        pass
    assert capsys.readouterr().err == ""
    with Lines(patience=0.01).phase("verifying"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "pahq: verifying ...\n"


def test_who_looks_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_watched()
    assert isinstance(make_progress(True), Lines) and isinstance(make_progress(False), Silence)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert isinstance(make_progress(True), Bars)


def test_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars().phase("capturing"):
        pass
    with Bars().count("ACDC", "test", total=100, done=10) as count:
        count.advance(30)
        count.expect(40)
        count.note(kept=7)
        count.advance(0)
    shown = capsys.readouterr().err
    assert "capturing ..." in shown and "10/100" in shown and "40/40" in shown.splitlines()[-1]


# -- how many tests there will be -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("ioi", 0.05), ("greater_than", 0.003)], ids=lambda p: p[0])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the demo."""
    task, tau = request.param
    folder: Path = tmp_path_factory.mktemp("progress") / "run"
    model = PAHQModel.from_pretrained("demo", FP32)
    model.discover(load_task(task, model.tokenizer, n=8), threshold=tau, out=folder, progress=False)
    return folder


def test_expected_tests_come_true(run: Path) -> None:
    """Early within a factor of two, though the graph has many more edges; at the end exactly."""
    graph = Circuit.from_pretrained(run).graph
    journal = Journal.read(run)
    assert journal is not None
    expected = ExpectedTests(graph, "acdc", graph.match_readers(None))
    records = [record_of(step) for step in journal.steps]
    total = sum(len(record.scores) for record in records)
    assert total < graph.edge_count / 1.8
    state, tests = Search.start(graph), 0
    for record in records:
        state.apply(record)
        tests += len(record.scores)
        guess = tests + expected.remaining(state)
        if tests > total / 4:
            assert total / 2 <= guess <= 2 * total
        if tests > 0.7 * total:
            assert 0.85 * total <= guess <= 1.15 * total
    assert guess == total


def test_dead_readers_and_others_not_searched_are_not_expected() -> None:
    graph = Graph(GraphSpec(layers=3, heads=2, kv_groups=2))
    everything = graph.match_readers(None)

    def after(kept: tuple[int, ...], chosen: np.ndarray = everything) -> int:
        state = Search.start(graph)
        edges = {writer: 0.0 for writer in graph.in_edges(graph.logits_reader)}
        state.apply(ReaderRecord(graph.logits_reader, True, kept, edges, 0.0))
        return ExpectedTests(graph, "acdc", chosen).remaining(state)

    assert after(()) == 0
    assert after((0,)) == 0, "input needs nobody"
    last = graph.mlp_writer(2)
    alone = after((last,), graph.match_readers("logits,m2"))
    assert alone == int(graph.prefix[graph.reader_index("m2")])
    assert after((last,)) > alone
    some = np.zeros_like(graph.all_edges)
    some[graph.reader_index("m2"), :3] = True
    state = Search.start(graph)
    expected = ExpectedTests(graph, "acdc", graph.match_readers("m2"), some)
    assert expected.remaining(state) == 3


def test_a_run_is_told_about(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tested = int(Circuit.from_pretrained(run).tested.sum())
    wrapped("llama").discover(TASK, threshold=0.05, out=tmp_path / "out")
    said = capsys.readouterr().err
    assert "\r" not in said and "ACDC, tau 0.05: " in said and f"{tested:,} tests" not in said


# -- attribution ----------------------------------------------------------------------------------------


class Recorder(Silence):
    """Notes down what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.total = self.done = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        yield

    @contextmanager
    def count(self, name: str, unit: str, total: int, done: int = 0) -> Iterator[Recorder]:
        self.total = total
        yield self

    def advance(self, steps: int) -> None:
        self.done += steps


@pytest.mark.parametrize("method", ["eap", "eap-ig", "hisp", "exact"])
def test_attribution_counts_to_its_end(method: Any) -> None:
    model, recorder = wrapped("llama"), Recorder()
    setting = Setting(model.patched, TASK, "logit_diff", "corrupted", FP32)
    edge_scores(method, Bench(setting, progress=recorder), steps=4)
    expected = {"eap-ig": 4 * len(TASK), "exact": model.graph.edge_count}.get(method, len(TASK))
    assert recorder.done == recorder.total == expected and recorder.phases == ["capturing"]


# -- seconds --------------------------------------------------------------------------------------------


def test_seconds_of_a_resumed_run_are_those_of_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, append = wrapped("llama"), Journal.append
    options: dict[str, Any] = {"threshold": 0.05, "progress": False, "out": tmp_path}

    def slow(journal: Journal, step: Step) -> None:
        if len(journal.steps) % 4 == 3:
            time.sleep(0.3)
            append(journal, step)
            raise KeyboardInterrupt
        append(journal, step)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", slow)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model.discover(TASK, resume=True, **options)
    kept = json.loads((tmp_path / "seconds.json").read_text())
    assert kept["search"] >= 0.6 and kept["capture"] > 0
    seconds = model.discover(TASK, resume=True, **options).discovery["seconds"]
    assert seconds["search"] >= kept["search"] and seconds["capture"] > kept["capture"]
    parts = [name for name in kept if name.startswith("search.")]
    assert parts and all(seconds[name] >= round(kept[name], 3) for name in parts)
    phases = [value for name, value in seconds.items() if name != "total" and "." not in name]
    assert seconds["total"] == pytest.approx(sum(phases), abs=0.01)
    assert "seconds.json" not in files_of(tmp_path), "the run's facts say it now"
    (tmp_path / "seconds.json").write_text("{}")  # it died over its picture
    model.discover(TASK, resume=True, **options)
    assert "seconds.json" not in files_of(tmp_path)


def test_a_second_counts_for_the_innermost_phase() -> None:
    clock = RunClock()
    with clock.phase("search"):
        with clock.phase("capture"):
            time.sleep(0.05)
        with clock.elsewhere():
            time.sleep(0.05)
    seconds = clock.report()
    assert seconds["capture"] >= 0.05 and seconds["search"] < 0.05
    assert seconds["total"] == pytest.approx(seconds["search"] + seconds["capture"], abs=0.002)


def test_a_killed_run_forgets_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = RunClock()
    with clock.phase("search"):
        clock.keep(tmp_path)
        assert not (tmp_path / "seconds.json").exists(), "a second is not over"
        monkeypatch.setattr("pahq_hf.search.clock._INTERVAL", 0.0)
        clock.keep(tmp_path)
    assert 0 < json.loads((tmp_path / "seconds.json").read_text())["search"] <= clock.seconds["search"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"search": "long", "capture": -1.0, "screen": NaN}',
        "{",
        '{"evaluations": -3, "reused": true}',
    ],
)
def test_damaged_seconds_count_for_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text(text)
    clock = RunClock()
    clock.take_over(tmp_path)
    assert clock.seconds == {} and clock.counts == {}
