"""Options of searches of one's own: switches, names that two of them have, types for Python alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from pahq_hf import register_search
from pahq_hf.errors import ConfigError
from pahq_hf.search.kind import Found, SearchOptions
from pahq_hf.search.registry import _SEARCHES, searches
from pahq_hf.search.work import Work
from tests.helpers import id_rows, run_main, save_tiny, wrapped, write_rows
from tests.models import random_task

TASK = random_task(batch=2, length=5, seed=3)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers ends with it."""
    monkeypatch.setattr("pahq_hf.search.registry._SEARCHES", dict(_SEARCHES))
    yield


def everything(work: Work[Any]) -> Found:
    """Keep all edges."""
    every = work.graph.all_edges
    return Found(every.copy(), np.zeros(every.shape), work.graph.no_edges())


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model and prompts, as the command line names them."""
    folder = tmp_path_factory.mktemp("options")
    save_tiny(folder / "model")
    data = write_rows(folder / "task.jsonl", id_rows(TASK))
    return [str(folder / "model"), "--task", str(data), "--precision", "fp32"]


def test_a_switch_is_turned_on_and_off(
    where: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its default; the command that comes next has it as it was given."""

    @dataclass(frozen=True)
    class Switches(SearchOptions):
        fast: bool = True
        slow: bool = False
        perhaps: bool | None = None
        threshold: float = 0.1

    register_search("switched", Switches)(everything)
    command = ["discover", *where, "--search", "switched", "--json", "--out"]
    for number, (given, expected) in enumerate(
        (
            ([], (True, False, None)),
            (["--no-fast", "--slow", "--no-perhaps"], (False, True, False)),
            (["--fast", "--no-slow", "--perhaps"], (True, False, True)),
        )
    ):
        assert run_main(*command, str(tmp_path / str(number)), *given) == 0
        facts = json.loads(capsys.readouterr().out)
        assert tuple(facts["arguments"][name] for name in ("fast", "slow", "perhaps")) == expected
        assert all(word in facts["next"].split() for word in given), facts["next"]
    assert run_main("discover", "--help") == 0
    shown = capsys.readouterr().out
    assert "--no-fast" in shown and "--no-absolute" in shown


def test_a_switch_leaves_no_room_for_its_opposite() -> None:
    @dataclass(frozen=True)
    class Both(SearchOptions):
        no_fast: int = 1
        fast: bool = True

    with pytest.raises(ConfigError, match="field 'fast' is called 'no_fast' on the command line, as another"):
        register_search("both", Both)


def test_one_name_means_one_thing_on_the_command_line(where: list[str], tmp_path: Path) -> None:
    """The second search's value would be read as the first's."""

    def options_of(annotation: Any, default: Any, name: str = "parts") -> Any:
        body = {"__annotations__": {name: annotation}, name: default, "__module__": __name__}
        return dataclass(frozen=True)(type("Own", (SearchOptions,), body))

    register_search("first", options_of(int, 5))(everything)
    register_search("same", options_of(int | None, None))(everything)
    for annotation, default, words in (
        (float, 0.5, "'parts' is int, of search 'first', and cannot be float too"),
        (bool, True, "cannot be bool too"),
        (Literal["few", "many"], "few", r"cannot be Literal\['few', 'many'\] too"),
    ):
        with pytest.raises(ConfigError, match=words):
            register_search("second", options_of(annotation, default))
    with pytest.raises(ConfigError, match="'threshold' is float, of search 'acdc', and cannot be str too"):
        register_search("second", options_of(str, "low", "threshold"))
    assert "second" not in searches()
    register_search("second", options_of(float, 0.5), command_line=False)(everything)
    found = wrapped("llama").discover(TASK, search="second", parts=0.25, progress=False)
    assert found.record.arguments.more["parts"] == 0.25


def test_each_search_has_a_least_value_of_its_own(
    where: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`refine` has `edges` too, from 1 on: what it refuses another search may take."""

    @dataclass(frozen=True)
    class Few(SearchOptions):
        edges: int = 5

    register_search("few", Few)(everything)
    command = ["discover", *where, "--json", "--out", str(tmp_path / "run"), "--edges", "-1", "--search"]
    assert run_main(*command, "refine") == 2
    assert "edges must be a whole number from 1 on; got -1" in capsys.readouterr().err
    assert run_main(*command, "few") == 0
    assert json.loads(capsys.readouterr().out)["arguments"]["edges"] == -1


@dataclass(frozen=True)
class PythonOptions(SearchOptions):
    """Options that no command line can take."""

    layers: tuple[int, ...] = (0, 1)
    weights: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """The path as text."""
        return asdict(self) | {"weights": None if self.weights is None else str(self.weights)}


def test_a_search_for_python_alone_has_options_of_any_type(
    where: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def stopped(work: Work[PythonOptions]) -> Found:
        seen.append(work.options)
        if not work.steps:
            work.keep({"done": 1})
            raise KeyboardInterrupt
        return everything(work)

    with pytest.raises(ConfigError, match=r"field 'layers' is a tuple.*registered with command_line=False"):
        register_search("mine", PythonOptions)
    register_search("mine", PythonOptions, command_line=False)(stopped)
    model, out = wrapped("llama"), tmp_path / "run"
    options: dict[str, Any] = {"layers": (1,), "weights": tmp_path / "w", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        model.discover(TASK, search="mine", out=out, **options)
    found = model.discover(TASK, search="mine", out=out, resume=True, **options)
    assert seen == [PythonOptions(layers=(1,), weights=tmp_path / "w")] * 2
    again = model.discover(TASK, search="mine", out=out, resume=True, **options)  # it is finished
    assert np.array_equal(again.kept, found.kept) and again.record.arguments.more["layers"] == [1]
    assert len(seen) == 2

    assert run_main("discover", *where, "--search", "mine", "--out", str(tmp_path / "other")) == 2
    said = "pahq: search 'mine' is for Python alone: model.discover(task, search='mine')\n"
    assert capsys.readouterr().err == said
    assert run_main("discover", "--help") == 0
    assert "--layers" not in capsys.readouterr().out
