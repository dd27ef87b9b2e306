"""Packages that add to the command line by an entry point of the group `pahq_hf`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pahq_hf import Circuit
from pahq_hf.search.registry import _SEARCHES
from pahq_hf.tasks.metrics import find_metric, known_metrics
from tests.helpers import run_main

MODULE = """
from pahq_hf import MetricSpec, register_metric


def miss(logits, targets):
    right = targets.answers.mean(targets.answers.gather(logits))
    return logits.logsumexp(-1) - right


register_metric(MetricSpec("own_miss", miss, needs=("answers",)))
"""


SEARCH = """
from dataclasses import dataclass

import numpy as np

from pahq_hf import register_search
from pahq_hf.search.kind import Found, SearchOptions


@dataclass(frozen=True)
class FewOptions(SearchOptions):
    few: int = 50


@register_search("own-few", FewOptions, title="few edges")
def few(work):
    scores = work.engine.drop_each(work.graph.all_edges)
    kept = work.graph.no_edges()
    order = np.argsort(np.where(work.graph.all_edges, -scores, np.inf), axis=None)
    kept.flat[order[: work.options.few]] = True
    return Found(kept, scores, work.graph.all_edges.copy())
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, which is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(
        "pahq_hf.tasks.metrics._METRICS", {name: find_metric(name) for name in known_metrics()}
    )
    yield folder
    sys.modules.pop("own_extension", None)


def install(site: Path, module: str) -> None:
    """Install a package `own` whose module adds something."""
    (site / "own_extension.py").write_text(module)
    facts = site / "own-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[pahq_hf]\nmine = own_extension\n")


def test_an_installed_metric_is_searched_with(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, MODULE)
    out = tmp_path / "run"
    search = ("discover", "demo", "--task", "ioi", "--n", "2", "--precision", "fp32", "--readers", "logits")
    assert run_main(*search, "--metric", "own_miss", "--out", str(out)) == 0
    assert run_main("show", str(out)) == 0
    assert "own_miss" in capsys.readouterr().out


def test_an_installed_search_brings_its_options(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, SEARCH)
    try:
        search = ("discover", "demo", "--task", "ioi", "--n", "2", "--precision", "fp32")
        out = tmp_path / "run"
        assert run_main(*search, "--search", "own-few", "--few", "7", "--out", str(out), "--json") == 0
        assert Circuit.from_pretrained(out).edge_count == 7
        capsys.readouterr()
        assert run_main("discover", "--help") == 0
        assert "--few" in capsys.readouterr().out
    finally:
        _SEARCHES.pop("own-few", None)


def test_one_that_fails_is_told_of_and_ends_nothing(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "raise RuntimeError('no \\x1b[2J such\\nluck')")
    assert run_main("tasks", "--json") == 0
    assert capsys.readouterr().err == (
        "pahq: extension mine of own was not loaded: RuntimeError: no \\x1b[2J such\n"
    )


BAD = """
from __future__ import annotations
from dataclasses import dataclass, field
from pahq_hf import register_search
from pahq_hf.search.kind import SearchOptions, told

@dataclass(frozen=True)
class Options(SearchOptions):
    {}

register_search("own-bad", Options)(lambda work: None)
"""


@pytest.mark.parametrize(
    "declared",
    [
        "x: Nothing = None",
        "x: tuple = (1, 2)",
        "x: int = 'a'",
        "x: int = field(default=1, metadata=told('X', name='a b'))",
        "x: int = field(default=1, metadata=told('X', name='class'))",
        "x: int = 1; y: int = field(default=1, metadata=told('Y', name='x'))",
        "raise SystemExit(3)",
    ],
)
def test_a_bad_option_costs_its_extension_and_nothing_else(
    site: Path, capsys: pytest.CaptureFixture[str], declared: str
) -> None:
    install(site, BAD.format(declared))
    assert run_main("discover", "--help") == 0
    told = capsys.readouterr()
    assert told.err.startswith("pahq: extension mine of own was not loaded: ") and told.err.count("\n") == 1
    assert "--json" in told.out and "own-bad" not in _SEARCHES


@pytest.mark.parametrize("name", ["seed", "task", "batch", "json", "cut-off", "help"])
def test_an_option_called_as_the_commands_own_takes_nothing_from_it(
    site: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    install(site, BAD.format(f"x: str = field(default='', metadata=told('Mine.', name={name!r}))"))
    try:
        assert run_main("discover", "--help") == 0
        told = capsys.readouterr()
        assert told.err == "" and "--json" in told.out and "--seed" in told.out
        assert ("--cut-off" if name == "cut-off" else f"--search-{name}") in told.out
    finally:
        _SEARCHES.pop("own-bad", None)
