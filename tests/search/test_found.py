"""What a search of one's own returns: one line names what is wrong with it, and nothing is saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pahq_hf import Circuit, register_metric, register_search
from pahq_hf.circuit.graph import Graph
from pahq_hf.errors import ConfigError, UnverifiedWarning
from pahq_hf.search.kind import Found, SearchOptions, told
from pahq_hf.search.registry import _SEARCHES
from pahq_hf.search.work import Work
from pahq_hf.tasks.metric_spec import MetricSpec
from pahq_hf.tasks.metrics import _METRICS
from tests.helpers import id_rows, run_main, save_tiny, wrapped, write_rows
from tests.models import random_task

TASK = random_task(batch=2, length=5, padding="right", seed=3, metric="logit_diff")


@contextmanager
def registered(function: Callable[[Work[Any]], Any], options: type[Any] = SearchOptions) -> Iterator[None]:
    """The search `mine` while inside."""
    register_search("mine", options)(function)
    try:
        yield
    finally:
        del _SEARCHES["mine"]


def discover(out: Path | None = None, **options: Any) -> Circuit:
    """Run it on a tiny model."""
    return wrapped("llama").discover(TASK, search="mine", out=out, progress=False, **options)


def whole(graph: Graph) -> Found:
    """All edges."""
    return Found(graph.all_edges.copy(), np.zeros(graph.all_edges.shape), graph.all_edges.copy())


Change = Callable[[Found], Any]
BAD: Mapping[str, tuple[Change, str]] = {
    "nothing": (lambda found: None, "must return a Found"),
    "an array": (lambda found: found.kept, "must return a Found"),
    "no such edges": (
        lambda found: replace(found, kept=np.ones_like(found.kept)),
        r"its kept has \d+ edges that the graph does not, such as a0\.h0->a0\.h0<q>",
    ),
    "no such tested edges": (lambda found: replace(found, tested=np.ones_like(found.kept)), "its tested has"),
    "NaN": (lambda found: replace(found, scores=found.scores * math.nan), "its scores are NaN"),
    "infinity": (lambda found: replace(found, scores=found.scores + math.inf), "its scores are NaN or inf"),
    "a missing row": (lambda found: replace(found, kept=found.kept[1:]), "its kept must be .* of shape"),
    "turned scores": (lambda found: replace(found, scores=found.scores.T.copy()), "its scores must be"),
    "numbers as edges": (
        lambda found: replace(found, kept=found.kept.astype(int)),
        "its kept must be .*int64",
    ),
    "objects": (
        lambda found: replace(found, scores=found.scores.astype(object)),
        "its scores must be .*object",
    ),
    "half": (
        lambda found: replace(found, scores=found.scores.astype(np.float16)),
        "its scores must be .*float16",
    ),
    "a list": (lambda found: replace(found, kept=found.kept.tolist()), "its kept must be .*list"),
    "a tensor": (
        lambda found: replace(found, tested=torch.tensor(found.tested)),
        "its tested must be .*Tensor",
    ),
    "no scores": (lambda found: replace(found, scores=None), "its scores must be .*NoneType"),
    "readers by name": (lambda found: replace(found, searched=["logits"]), "its searched must be .*list"),
    "too few readers": (lambda found: replace(found, searched=found.kept[:3, 0]), "its searched must be"),
    "a final text": (lambda found: replace(found, final="0.1"), "its final must be a finite number"),
    "a final NaN": (lambda found: replace(found, final=math.nan), "its final must be a finite number"),
    "facts in a list": (lambda found: replace(found, facts=["fast"]), "its facts must be a mapping"),
    "facts by number": (lambda found: replace(found, facts={1: 2}), "its facts must be a mapping"),
    "a label": (lambda found: replace(found, label=3), "its label must be a string"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=list(BAD))
def test_what_is_no_circuit_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=f"search 'mine' .*{message}")
    with registered(lambda work: change(whole(work.graph))), refused as caught:
        discover(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "circuit.json").exists()


def test_what_is_a_circuit_is_taken_as_it_is(tmp_path: Path) -> None:
    """Whatever stands where there is no edge, a NumPy number, and the graph's own arrays."""

    def fine(work: Work[Any]) -> Found:
        edges = work.graph.all_edges
        return Found(edges, np.where(edges, 0.5, math.nan), edges, final=np.float32(0.25), facts={"a": 1})

    with registered(fine), pytest.warns(UnverifiedWarning, match="0.25 by the search"):
        circuit = discover(tmp_path / "run")
    again = Circuit.from_pretrained(tmp_path / "run")
    assert np.array_equal(again.kept, again.graph.all_edges)
    assert np.array_equal(again.scores, 0.5 * again.graph.all_edges)
    assert circuit.record.metric.final == 0.25 and again.record.more["a"] == 1


def test_sections_of_the_record_are_not_a_searchs_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = {"screen": 0.1, "second_looks": 3, "resumed_readers": "none", "rounds": 7}
    with registered(lambda work: replace(whole(work.graph), facts=facts)):
        discover(tmp_path / "run")
    assert Circuit.from_pretrained(tmp_path / "run").record.more == {"rounds": 7}
    warned = [message for message in caplog.messages if "left out of the record" in message]
    assert [message.split("'")[1] for message in warned] == ["screen", "second_looks", "resumed_readers"]


def test_the_graph_cannot_be_altered() -> None:
    def careless(work: Work[Any]) -> Found:
        work.graph.all_edges[0] = False
        return whole(work.graph)

    graph = wrapped("llama").graph
    with registered(careless), pytest.raises(ValueError, match="read-only"):
        discover()
    with pytest.raises(ValueError, match="read-only"):
        graph.prefix[0] = 0
    assert graph.all_edges.sum() == graph.edge_count


# -- what a search raises, and options that cannot be -------------------------------------------------------


def test_what_a_search_raises_is_passed_on() -> None:
    error = KeyError("no such head")

    def fails(work: Work[Any]) -> Found:
        raise error

    with registered(fails), pytest.raises(KeyError) as caught:
        discover()
    assert caught.value is error


@dataclass(frozen=True, kw_only=True)
class Needy(SearchOptions):
    """One option without a default, one that Python may give anything."""

    edges: int
    where: str = ""


def test_options_that_cannot_be_are_refused_before_any_work(tmp_path: Path) -> None:
    with registered(lambda work: whole(work.graph), Needy):
        with pytest.raises(ConfigError, match="search 'mine' needs option 'edges'"):
            discover(tmp_path / "run")
        for odd in (Path("a"), {1, 2}, np.zeros(3), lambda: None):
            with pytest.raises(ConfigError, match="search 'mine': its option 'where' is no JSON"):
                discover(tmp_path / "run", edges=3, where=odd)
        assert not (tmp_path / "run").exists()
        assert discover(tmp_path / "run", edges=3, where="here").record.arguments.more["edges"] == 3


# -- the command line ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of the search, but for its folder."""
    folder = tmp_path_factory.mktemp("found")
    save_tiny(folder / "model")
    data = write_rows(folder / "task.jsonl", id_rows(TASK))
    named = ["discover", str(folder / "model"), "--task", str(data), "--precision", "fp32"]
    return [*named, "--metric", "logit_diff", "--search", "mine"]


def test_a_search_that_fails_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(work: Work[Any]) -> Found:
        work.engine.metric_of(work.graph.all_edges)
        raise ValueError("no head\nhas this number")

    out = tmp_path / "run"
    with registered(fails):
        assert run_main(*command, "--out", str(out)) == 2
        shown = capsys.readouterr().err
        assert "pahq: search 'mine' failed: ValueError: no head; PAHQ_TRACEBACK=1 shows where" in shown
        assert "Traceback" not in shown and not (out / "circuit.json").exists()
        monkeypatch.setenv("PAHQ_TRACEBACK", "1")
        assert run_main(*command, "--out", str(tmp_path / "again")) == 2
    shown = capsys.readouterr().err
    assert "in fails" in shown and shown.endswith("pahq: search 'mine' failed: ValueError: no head\n")


def test_a_metric_that_fails_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(logits: Any, targets: Any) -> Any:
        return {}["margin"]

    register_metric(MetricSpec("mine", fails))
    register_metric(MetricSpec("number", lambda logits, targets: 0.5))
    try:
        assert run_main(*command[:-4], "--metric", "mine", "--out", str(tmp_path / "run")) == 2
        assert "pahq: metric 'mine' failed: KeyError: 'margin';" in capsys.readouterr().err
        assert run_main(*command[:-4], "--metric", "number", "--out", str(tmp_path / "run")) == 2
        assert "metric number must give a tensor, one value a row; got float" in capsys.readouterr().err
    finally:
        del _METRICS["mine"], _METRICS["number"]


def test_an_option_that_is_missing_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counted(SearchOptions):
        edges: int

    with registered(lambda work: whole(work.graph), Counted):
        assert run_main(*command, "--out", str(tmp_path / "run")) == 2
    assert "search 'mine' needs option 'edges'" in capsys.readouterr().err


@dataclass(frozen=True)
class Unset(SearchOptions):
    """A threshold that is no number unless it is given."""

    threshold: float | None = None


@dataclass(frozen=True)
class Renamed(SearchOptions):
    """A threshold that is called otherwise on the command line."""

    threshold: float = field(default=0.5, metadata=told("Of scores.", name="cut"))


@dataclass(frozen=True)
class Numbered(SearchOptions):
    """A threshold as ACDC has it."""

    threshold: float = 0.5


@pytest.mark.parametrize("share", [1, 0])
@pytest.mark.parametrize("options", [SearchOptions, Unset, Renamed, Numbered])
def test_only_a_threshold_that_is_one_is_shifted(
    options: type[Any], share: int, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All edges, of which fewer would do, and none, of which more are wanted."""

    def found(work: Work[Any]) -> Found:
        every = whole(work.graph)
        return every if share else replace(every, kept=work.graph.no_edges())

    with registered(found, options):
        assert run_main(*command, "--out", str(tmp_path / "run"), "--json") == 0
    following = json.loads(capsys.readouterr().out)["next"]
    assert Circuit.from_pretrained(tmp_path / "run").edge_count >= 0
    if options is Numbered:
        assert following.startswith("pahq discover") and f"--threshold {1.5 if share else 0.17}" in following
    else:
        assert following.startswith(("pahq evaluate", "pahq show")) and "--threshold" not in following
