"""`pahq evaluate` with its options: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pahq_hf import Circuit
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.circuit.interchange import export
from pahq_hf.circuit.render.plots import Line, Plot, draw_plot, page_of
from pahq_hf.cli.evaluation_tables import evaluation_tables
from pahq_hf.evaluation.audit import Audited
from tests.browser import chromium
from tests.helpers import id_rows, random_edges, run_main, save_tiny, write_rows
from tests.models import HEADS, random_task

TASK = random_task(batch=2, seed=11)
GRAPH = Graph(GraphSpec(layers=2, heads=HEADS, kv_groups=HEADS))
Evaluate = Callable[..., int]


def circuit_of(share: float, seed: int, **discovery: Any) -> Circuit:
    kept = random_edges(GRAPH, share, seed)
    scores = np.where(GRAPH.all_edges, np.random.default_rng(seed).normal(size=kept.shape), 0.0)
    return Circuit(GRAPH, kept, scores, GRAPH.all_edges.copy(), {"model_type": "gpt2"}, discovery)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    save_tiny(folder / "model", "gpt2")
    write_rows(folder / "ids.jsonl", id_rows(TASK))
    run = {"arguments": {"threshold": 0.02, "metric": "kl"}, "metric": {"name": "kl"}}
    circuit_of(0.3, 0, **run).save_pretrained(folder / "acdc")
    circuit_of(0.3, 0, method="eap", **run).save_pretrained(folder / "eap")
    truth = circuit_of(0.02, 5)
    truth.save_pretrained(folder / "truth")
    export(truth, folder / "truth.json", "mib")
    export(Circuit(GRAPH, GRAPH.no_edges(), truth.scores, truth.tested), folder / "nothing.json", "mib")
    deep = Graph(GraphSpec(layers=3, heads=HEADS, kv_groups=HEADS))
    export(
        Circuit(deep, deep.all_edges, np.zeros(deep.all_edges.shape), deep.all_edges),
        folder / "deep.json",
        "mib",
    )
    return folder


@pytest.fixture
def evaluate(root: Path) -> Evaluate:
    def run(*options: str, circuit: str = "acdc") -> int:
        where = ["--model", str(root / "model"), "--task", str(root / "ids.jsonl")]
        return run_main("evaluate", str(root / circuit), *where, *options)

    return run


def test_everything_as_json(root: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--curve", "--minimality", "--completeness", "--samples", "2", "--json")
    assert evaluate(*options, "--reference", str(root / "truth.json")) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    facts = json.loads(out)
    circuit = Circuit.from_pretrained(root / "acdc")
    assert {"kl", "accuracy", "edges", "faithfulness", "logit_diff", "sparsity"} <= set(facts)
    assert facts["edges"] == circuit.edge_count
    assert set(facts["minimality"]["effects"]) == {name for name, _ in circuit.edges}
    assert facts["minimality"]["could_go"] == sum(e < 0.02 for e in facts["minimality"]["effects"].values())
    assert facts["completeness"]["samples"] == 2
    assert facts["curve"]["signed"]["fractions"][0] == 0.001
    assert facts["curve"]["cpr"] == facts["curve"]["signed"]["cpr"]
    assert facts["curve"]["cmd"] == facts["curve"]["absolute"]["cmd"]
    assert facts["curve"]["cpr_log"] == facts["curve"]["signed"]["cpr_log"]
    assert facts["curve"]["cmd_log"] == facts["curve"]["absolute"]["cmd_log"] > 0
    assert facts["reference"]["edges"]["truth"] == Circuit.from_pretrained(root / "truth").edge_count
    auc = facts["reference"]["edges"]["roc"]["auc"]
    assert 0 <= auc["step"] <= auc["trapezoid"] <= 1


def test_a_folder_and_a_file_are_one_reference(
    root: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for name in ("truth", "truth.json"):
        assert evaluate("--json", "--reference", str(root / name)) == 0
        found.append(json.loads(capsys.readouterr().out)["reference"])
    assert found[0] == found[1]


def test_only_a_greedy_search_ranks_kept_edges_first(
    root: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    auc = {}
    for circuit in ("acdc", "eap"):
        assert evaluate("--json", "--reference", str(root / "acdc"), circuit=circuit) == 0
        auc[circuit] = json.loads(capsys.readouterr().out)["reference"]["edges"]["roc"]["auc"]["trapezoid"]
    assert auc["acdc"] == 1
    assert auc["eap"] == pytest.approx(0.5, abs=0.2)


def test_tables(root: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--curve", "--minimality", "--completeness", "--samples", "1")
    assert evaluate(*options, "--reference", str(root / "truth")) == 0
    out = capsys.readouterr().out
    for words in ("sparsity", "CPR", "CMD", "could go", "complement_faithfulness", "AUC step", "recall"):
        assert words in out
    for row in ("0.001", "edges", "nodes"):
        assert re.search(rf"│ +{re.escape(row)} ", out)


def test_plots(root: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    folder = tmp_path / "new" / "plots"
    assert evaluate("--curve", "--reference", str(root / "truth"), "--plots", str(folder)) == 0
    names = {f"{plot}.{fmt}" for plot in ("faithfulness", "roc") for fmt in ("png", "svg", "html")}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "roc.svg").read_text()
    assert "Plotly.newPlot" in (folder / "faithfulness.html").read_text()


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "plots of nothing": (("--plots", "out"), "give one of them"),
    "no such reference": (("--reference", "{root}/nowhere"), "nowhere"),
    "no circuit": (("--reference", "{root}/ids.jsonl"), "ids.jsonl"),
    "a deeper reference": (("--reference", "{root}/deep.json"), "is not an edge of"),
    "an empty reference": (("--reference", "{root}/nothing.json"), "it holds none"),
    "negative samples": (("--completeness", "--samples", "-1"), "samples"),
    "samples in words": (("--completeness", "--samples", "few"), "samples"),
    "a file for a folder": (("--curve", "--plots", "{root}/ids.jsonl"), "cannot create the output folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_one_line_and_code_2(
    name: str,
    root: Path,
    tmp_path: Path,
    evaluate: Evaluate,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options, words = BAD[name]
    assert evaluate(*(option.format(root=root) for option in options)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and words in captured.err
    assert list(tmp_path.iterdir()) == []


HOSTILE = '</script><script>window.intruder = 1</script><img src=x onerror="window.intruder = 1">'
PLOT = Plot(
    HOSTILE, HOSTILE, "y", [Line(HOSTILE, [0.1, 1.0], [0.0, 2.0]), Line("b", [0.1, 1.0], [1, 1])], True
)


def test_a_page_lets_only_its_own_scripts_run() -> None:
    page = page_of(PLOT)
    assert HOSTILE not in page and "<img" not in page.partition("<script>")[0]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and "default-src 'none'" in policy[1]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy[1]) == hashes
    assert re.search(r'(src|href)="', page.split("<script>")[0]) is None


def test_a_page_draws_and_runs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plot.html"
    path.write_text(page_of(PLOT), encoding="utf-8")
    with chromium() as browser:
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("#plot-0 .scatterlayer .trace")
        assert page.locator("#plot-0 .scatterlayer .trace").count() == 2
        assert page.evaluate("window.intruder") is None
        assert problems == []


def test_a_figure_has_every_line() -> None:
    axes = draw_plot(
        Plot("t", "x", "y", [Line("a", [0.1, 1], [0, 1], steps=True), Line("b", [0.1, 1], [1, 1])])
    )
    assert [line.get_label() for line in axes.axes[0].lines] == ["a", "b"]
    assert axes.axes[0].lines[0].get_drawstyle() == "steps-post"


def test_an_audit_without_a_wrong_decision_has_no_empty_table() -> None:
    found = Audited(removed=30, audited=30, estimated=4, wrong=0, at_most=0.0)
    console = Console(width=100, record=True, file=io.StringIO())
    for table in evaluation_tables({"audit": found.to_dict()}):
        console.print(table)
    text = console.export_text()
    assert "0 of 30 audited were wrong, of all there are (4 were estimates)" in text
    assert "decided otherwise" not in text
