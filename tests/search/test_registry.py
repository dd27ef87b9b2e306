"""A search of one's own: registered, run, interrupted, continued, verified, recorded, saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pahq_hf import Circuit, register_search
from pahq_hf.circuit.card import render_card
from pahq_hf.config import EngineConfig
from pahq_hf.errors import ConfigError, RunError
from pahq_hf.search.attribution.options import AttributionConfig
from pahq_hf.search.journal import Journal, Step
from pahq_hf.search.kind import Found, SearchOptions, told
from pahq_hf.search.registry import _SEARCHES, find_search, searches
from pahq_hf.search.work import Work
from tests.helpers import (
    assert_same_circuit,
    files_of,
    id_rows,
    run_main,
    save_tiny,
    wrapped,
    write_rows,
)
from tests.models import random_task

TASK = random_task(batch=3, length=6, padding="right", seed=3, metric="logit_diff")
TAU = 0.002


@dataclass(frozen=True)
class ReadersOptions(SearchOptions):
    """Options of `by_readers`."""

    threshold: float = 0.01
    at_most: int | None = field(default=None, metadata=told("Remove at most so many readers.", min=0))

    def validate(self) -> None:
        """Check them."""
        super().validate()
        if self.threshold < 0:
            raise ConfigError(f"threshold must be >= 0; got {self.threshold}")


def by_readers(work: Work[ReadersOptions]) -> Found:
    """Remove all edges of a reader at once where that costs less than the threshold."""
    graph, engine = work.graph, work.engine
    kept, scores = graph.all_edges.copy(), np.zeros(graph.all_edges.shape)
    metric = engine.metric_of(kept)
    done, most = {step["reader"]: step for step in work.steps}, work.options.at_most
    for reader in graph.reader_order("acdc"):
        if not graph.all_edges[reader].any():
            continue
        without = kept.copy()
        without[reader] = False
        if reader in done:
            score = done[reader]["score"]
        else:
            score = engine.metric_of(without) - metric
            work.keep({"reader": reader, "score": score})
        scores[reader][graph.all_edges[reader]] = score
        if score < work.options.threshold and (most is None or most > 0):
            kept, metric, most = without, metric + score, None if most is None else most - 1
    return Found(kept, scores, graph.all_edges.copy(), facts={"readers_tested": len(graph.readers)})


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The search is there in a test, and gone after it."""
    register_search("by-readers", ReadersOptions, title="whole readers, greedily")(by_readers)
    yield
    del _SEARCHES["by-readers"]


def discover(out: Path | None = None, **options: Any) -> Circuit:
    """Run it on a tiny model."""
    model = wrapped("llama")
    chosen = {"search": "by-readers", "threshold": TAU, "progress": False}
    return model.discover(TASK, out=out, **(chosen | options))


def test_it_runs_and_is_verified_and_recorded_as_any_search(tmp_path: Path) -> None:
    circuit = discover(tmp_path / "run")
    counts, all_counts = circuit.kept.sum(axis=1), circuit.graph.all_edges.sum(axis=1)
    assert ((counts == 0) | (counts == all_counts)).all() and 0 < counts.sum() < all_counts.sum()
    record = circuit.record
    assert (record.method, record.title, record.ranks_kept_first) == (
        "by-readers",
        "whole readers, greedily",
        False,
    )
    assert record.arguments.threshold == TAU and record.arguments.metric == "logit_diff"
    assert circuit.verified is True and record.metric.final_recomputed == pytest.approx(record.metric.final)
    assert record.evaluations and record.seconds["search"] > 0 and record.peak_memory["rss"] > 0
    assert record.more["readers_tested"] == len(circuit.graph.readers)
    assert circuit.verdict is not None and circuit.means
    again = Circuit.from_pretrained(tmp_path / "run")
    assert_same_circuit(again, circuit)
    assert again.record == record
    assert "whole readers, greedily" in render_card(circuit)
    names = {"journal.jsonl", "circuit.json", "scores.safetensors", "discovery.json", "README.md"}
    assert names <= set(files_of(tmp_path / "run"))


def test_a_fact_that_no_record_can_hold_costs_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that a run says itself, or a value that is no JSON; all else is saved."""

    def boastful(work: Work[ReadersOptions]) -> Found:
        kept = work.graph.all_edges.copy()
        facts = {"seconds": 1, "verdict": "great", "rounds": 7, "edges_left": np.int64(3)}
        return Found(kept, np.zeros(kept.shape), kept, facts=facts)

    register_search("boastful", ReadersOptions, title="boasting")(boastful)
    try:
        circuit = discover(tmp_path / "run", search="boastful")
    finally:
        del _SEARCHES["boastful"]
    assert circuit.record.more == {"rounds": 7}
    assert circuit.record.seconds["total"] > 0 and circuit.verdict is not None
    told = [message for message in caplog.messages if "left out of the record" in message]
    assert [message.split("'")[1] for message in told] == ["seconds", "verdict", "edges_left"]


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, append, out = discover(), Journal.append, tmp_path / "run"

    def fail(journal: Journal, step: Step) -> None:
        if len(journal.steps) == 4:
            raise KeyboardInterrupt
        append(journal, step)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", fail)
        with pytest.raises(KeyboardInterrupt):
            discover(out)
    lines = (out / "journal.jsonl").read_bytes().splitlines()
    assert len(lines) == 5 and json.loads(lines[0])["by-readers"]["threshold"] == TAU
    with pytest.raises(RunError, match=r"holds a run already .* continue it with --resume"):
        discover(out)
    with pytest.raises(RunError, match=r"its threshold is 0\.002 there, 0\.1 now"):
        discover(out, resume=True, threshold=0.1)
    with pytest.raises(RunError, match="its search is by-readers there, acdc now"):
        discover(out, resume=True, search="acdc")
    circuit = discover(out, resume=True)
    assert_same_circuit(circuit, whole)
    both, one = (run.record.evaluations or 0 for run in (circuit, whole))
    assert one <= both < 2 * one  # of both parts: the second has gone on


def test_a_step_before_the_engine_is_asked_pins_the_engine(tmp_path: Path) -> None:
    def early(work: Work[ReadersOptions]) -> Found:
        if not work.steps:
            work.keep({"began": True})
            raise KeyboardInterrupt
        return Found(
            every := work.graph.all_edges.copy(), np.zeros(every.shape), every, work.engine.metric_of(every)
        )

    register_search("early", ReadersOptions)(early)
    try:
        with pytest.raises(KeyboardInterrupt):
            discover(tmp_path, search="early", engine=EngineConfig("hooks"))
        assert discover(tmp_path, search="early", resume=True).record.engine == "hooks"
    finally:
        del _SEARCHES["early"]


def test_a_step_with_the_journals_own_field_is_refused(tmp_path: Path) -> None:
    """It would be taken for the checksum of its line, and the run could not be continued."""

    def checking(work: Work[ReadersOptions]) -> Found:
        work.keep({"check": 1})
        raise AssertionError("it was kept")

    register_search("checking", ReadersOptions)(checking)
    try:
        with pytest.raises(ConfigError, match="a step cannot have a 'check'"):
            discover(tmp_path, search="checking")
    finally:
        del _SEARCHES["checking"]


def test_a_finished_one_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = discover(tmp_path)
    monkeypatch.setattr("pahq_hf.search.bench.make_engine", None)
    before = files_of(tmp_path)
    assert_same_circuit(discover(tmp_path, resume=True), first)
    assert files_of(tmp_path) == before


def test_options_are_checked_before_any_work(tmp_path: Path) -> None:
    for options, message in (
        ({"search": "none"}, r"there is no search 'none'; there are acdc, budget, eap, .*by-readers"),
        ({"edges": 3}, "no option 'edges'"),
        ({"threshold": -1.0}, "threshold must be >= 0"),
        ({"ablation": "noise"}, "ablation must be one of"),
        ({"config": ReadersOptions()}, "not both"),
    ):
        with pytest.raises(ConfigError, match=message):
            discover(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_registered_is_refused() -> None:
    @dataclass
    class Loose:
        metric: str | None = None

    @dataclass(frozen=True)
    class Bare:
        edges: int = 1

    for name, options, message in (
        ("acdc", ReadersOptions, "there is a search 'acdc' already"),
        ("by-readers", ReadersOptions, "already"),
        ("By Readers", ReadersOptions, "lower-case letters"),
        ("mine", Loose, "must be frozen"),
        ("mine", Bare, "must have metric, ablation and to_dict"),
        ("mine", dict, "must be a dataclass"),
    ):
        with pytest.raises(ConfigError, match=message):
            register_search(name, options)  # type: ignore[type-var]
    assert "mine" not in searches()


def test_a_method_of_attribution_is_a_search() -> None:
    model = wrapped("llama")
    ours = model.discover(TASK, search="eap", topn=9, progress=False)
    assert_same_circuit(ours, model.attribute(TASK, method="eap", topn=9, progress=False))
    assert find_search("eap").fields and "method" not in find_search("eap").fields


def test_a_config_has_the_method_of_its_search_and_is_refused_with_another() -> None:
    model, quiet = wrapped("llama"), cast("Any", {"progress": False})
    by_config = model.discover(TASK, search="eap", config=AttributionConfig(topn=9), **quiet)
    assert by_config.discovery["arguments"]["method"] == by_config.record.method == "eap"
    assert_same_circuit(by_config, model.discover(TASK, search="eap", topn=9, **quiet))
    named = AttributionConfig(method="hisp", topn=9)
    assert_same_circuit(
        model.discover(TASK, search="hisp", config=named, **quiet),
        model.attribute(TASK, method="hisp", topn=9, **quiet),
    )
    with pytest.raises(ConfigError, match="search 'eap' has method 'eap', its config 'hisp'"):
        model.discover(TASK, search="eap", config=named, **quiet)
    assert AttributionConfig() == AttributionConfig(method="eap-ig")
    assert repr(AttributionConfig()) == repr(AttributionConfig(method="eap-ig"))
    for said in (
        AttributionConfig(method="eap-ig", topn=9),
        AttributionConfig.from_dict({"method": "eap-ig"}),
    ):
        with pytest.raises(ConfigError, match="search 'eap' has method 'eap', its config 'eap-ig'"):
            model.discover(TASK, search="eap", config=said, **quiet)
    for unsaid in (replace(AttributionConfig(), topn=9), copy.deepcopy(AttributionConfig(topn=9))):
        assert_same_circuit(model.discover(TASK, search="eap", config=unsaid, **quiet), by_config)


# -- the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model and prompts, as the command line names them."""
    folder = tmp_path_factory.mktemp("registry")
    save_tiny(folder / "model")
    data = write_rows(folder / "task.jsonl", id_rows(TASK))
    return [str(folder / "model"), "--task", str(data), "--precision", "fp32", "--metric", "logit_diff"]


def test_the_command_line_takes_its_options(
    where: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    command = ["discover", *where, "--out", out, "--search", "by-readers", "--threshold", "1e9"]
    assert run_main(*command, "--at-most", "2", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["method"], facts["arguments"]["threshold"]) == ("by-readers", 1e9)
    assert facts["arguments"]["at_most"] == 2 and facts["verified"] is True
    removed = Circuit.from_pretrained(out)
    counts = removed.kept.sum(axis=1)
    assert ((counts == 0) & (removed.graph.all_edges.sum(axis=1) > 0)).sum() == 2
    assert run_main(*command, "--at-most", "2", "--resume") == 0  # a finished run
    assert run_main(*command, "--at-most", "3", "--resume") == 2
    assert "its at most is 2 there, 3 now" in capsys.readouterr().err
    assert run_main("discover", "--help") == 0
    shown = capsys.readouterr().out
    assert "--at-most" in shown and "Remove at most" in shown and "--margin" in shown


def test_options_of_another_search_are_refused(
    where: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["discover", *where, "--out", str(tmp_path / "run")]
    for options, message in (
        (["--search", "by-readers", "--order", "acdc"], "search 'by-readers' takes no --order"),
        (["--at-most", "2"], "search 'acdc' takes no --at-most"),
        (["--search", "nothing"], "there is no search 'nothing'"),
        (["--search", "eap"], "search 'eap' has a command of its own: pahq attribute --method eap"),
        (["--search", "by-readers", "--at-most", "-1"], "--at-most"),
    ):
        assert run_main(*command, *options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_option_that_is_called_as_another_gets_a_prefix(
    where: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = []

    @dataclass(frozen=True)
    class Seeded(SearchOptions):
        seed: int = 0

    @register_search("seeded", Seeded)
    def seeded(work: Work[Seeded]) -> Found:
        seeds.append(work.options.seed)
        every = work.graph.all_edges
        return Found(every.copy(), np.zeros(every.shape), work.graph.no_edges())

    try:
        command = ["discover", *where, "--search", "seeded", "--out", str(tmp_path / "run"), "--json"]
        assert run_main(*command, "--search-seed", "7") == 0
        assert seeds == [7]
        assert json.loads(capsys.readouterr().out)["arguments"]["seed"] == 7
    finally:
        del _SEARCHES["seeded"]
