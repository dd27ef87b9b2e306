"""What options alone tell to be wrong is said before a model is loaded, and no option is ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pahq_hf import load_task
from pahq_hf.checkpoint import saved_config
from pahq_hf.checkpoint.load import load_tokenizer
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import ConfigError, MetricError, ModelLoadError
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.attribution.kinds import METHODS
from pahq_hf.search.attribution.options import AttributionConfig
from pahq_hf.search.journal import Journal
from pahq_hf.search.learning_options import LearningOptions
from pahq_hf.search.registry import find_search, searches
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.catalog import DESCRIPTIONS, foreseen_metric
from pahq_hf.tasks.metric_spec import MetricSpec
from pahq_hf.tasks.metrics import _METRICS, register_metric
from tests.helpers import run_main, write_rows
from tests.tiers import quick

LOADED = "a model would be loaded now"


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is said, and nothing is loaded."""

    def load(*_: Any, **__: Any) -> None:
        raise ModelLoadError(LOADED)

    monkeypatch.setattr(saved_config, "load", load)


@pytest.fixture
def count() -> Iterator[str]:
    """The name of a metric without a gradient."""
    register_metric(MetricSpec("count", lambda logits, _: logits.argmax(-1), differentiable=False))
    yield "count"
    del _METRICS["count"]


def said(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, *options: str) -> str:
    """The line of a command on the demo that ends with exit code 2."""
    where = ["demo", "--task", "ioi", "--n", "4", "--out", str(tmp_path / "run")]
    assert run_main(command, *where, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and not (tmp_path / "run").exists()
    return captured.err


# -- options that not all searches have --------------------------------------------------------------------

TAKEN: dict[str, tuple[str, set[str]]] = {
    "--steps": ("5", {"eap-ig", "eap-ig-activations", "ensemble"}),
    "--score-seed": ("0", {"random", "ensemble"}),
    "--members": ("eap-ig,random", {"ensemble"}),
    "--engine": ("hooks", {"exact"}),
    "--memory-budget": ("1GiB", {"exact"}),
    "--activation-store": ("disk", {"exact"}),
    "--topn": ("9", set(METHODS)),
}


@pytest.mark.parametrize("option", quick(TAKEN, "--steps", "--engine"))
def test_a_method_takes_the_options_that_it_uses(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, takers = TAKEN[option]
    for method in METHODS:
        line = said(capsys, tmp_path, "attribute", "--method", method, "--metric", "nll", option, value)
        if method in takers:
            assert LOADED in line
        else:
            assert f"method {method!r} takes no {option}, which is of --method " in line
            assert all(taker in line for taker in takers)


@pytest.mark.parametrize("name", [name for name, kind in searches().items() if kind.command == "discover"])
def test_a_search_takes_the_options_that_it_uses(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learns = issubclass(find_search(name).options, LearningOptions)
    goal = ["--edges", "20"] if learns else []
    line = said(capsys, tmp_path, "discover", "--search", name, *goal, "--batch", "4")
    assert (f"search {name!r} takes no --batch, which is of --search acdc and budget" in line) is learns
    assert (LOADED in line) is not learns


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gim", "steps": 7}, "steps are of method eap-ig and eap-ig-activations and ensemble"),
        ({"method": "eap-ig", "seed": 7}, "seed is of method random and ensemble; the method is eap-ig"),
        ({"method": "ensemble", "members": "eap,gim", "steps": 7}, "the members are eap,gim"),
        ({"method": "ensemble", "members": "eap-ig,gim", "seed": 7}, "the members are eap-ig,gim"),
    ],
)
def test_in_python_too(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AttributionConfig(**options)
    AttributionConfig("ensemble", members="eap-ig,random", steps=7, seed=7)


# -- what options contradict -------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, list[str], str]] = {
    "a margin in FP32": ("discover", ["--precision", "fp32", "--margin", "0.1"], "a margin needs precision"),
    "a margin in a sweep": (
        "sweep",
        ["--thresholds", "0.1", "--precision", "rtn", "--margin", "0.1"],
        "a margin needs precision pahq",
    ),
    "a margin of budget": (
        "discover",
        ["--search", "budget", "--precision", "fp32", "--margin", "0.1"],
        "a margin needs precision pahq",
    ),
    "a screen by a flat gradient": ("discover", ["--screen", "eap:0.1"], "eap cannot use kl"),
    "a method of a flat gradient": ("attribute", ["--method", "gim"], "gim cannot use kl"),
    "a member of a flat gradient": (
        "attribute",
        ["--method", "ensemble", "--members", "eap-ig,hisp"],
        "hisp cannot use kl",
    ),
    "distractors of a task that has none": (
        "discover",
        ["--task", "induction", "--metric", "logit_diff"],
        "metric logit_diff needs a distractor for every example; task 'induction' has none",
    ),
    "one pair to draw from": ("discover", ["--n", "1", "--bootstrap", "3"], "there is but one"),
    "noise of no steps": (
        "discover",
        ["--edges", "9", "--steps", "0", "--noise", "0.1"],
        "noise is of steps of learning, and steps 0 takes none",
    ),
    "an order of nodes": ("discover", ["--level", "node", "--order", "head"], "level node has no order"),
    "patience without a size": (
        "discover",
        ["--search", "refine", "--curve", "--patience", "5"],
        "patience counts rounds at the size of edges, and curve has no such size",
    ),
    "patience of no pairs": (
        "discover",
        ["--edges", "9", "--validation", "0", "--patience", "5"],
        "validation 0 keeps none",
    ),
    "pairs that means do not learn from": (
        "discover",
        ["--edges", "9", "--ablation", "mean", "--learn-pairs", "99"],
        "learn_pairs draws more pairs than are searched",
    ),
    "low precision in float64": ("discover", ["--dtype", "float64"], "low-precision regimes need dtype"),
    "FP8 products of other weights": (
        "discover",
        ["--format", "int8", "--compute", "fp8"],
        "compute=fp8 needs format fp8",
    ),
    "a choice that is none": ("discover", ["--tests", "verifed"], "'verifed' is not one of 'all'"),
    "a device that PyTorch is built without": (
        "discover",
        ["--device", "xla"],
        "device 'xla' cannot be used",
    ),
    "a device whose module is not there": ("discover", ["--device", "hpu"], "device 'hpu' cannot be used"),
    "a device of another PyTorch": ("discover", ["--device", "xpu"], "finds none of type xpu here"),
    "a device of another machine": ("discover", ["--device", "mps"], "finds none of type mps here"),
    "a device that is not there": ("discover", ["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_said_before_a_model_is_loaded(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, options, words = WRONG[name]
    line = said(capsys, tmp_path, command, *options)
    assert words in line and LOADED not in line and "Value error" not in line and len(line) < 350


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run", "x" * 300):
        line = said(capsys, tmp_path, "discover", "--out", str(tmp_path / out))
        assert "cannot create the output folder" in line and LOADED not in line
    assert LOADED in said(capsys, tmp_path, "discover", "--out", str(tmp_path / "new" / "run"))
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_one_pair_of_a_file_to_draw_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = {"clean": "a b", "corrupted": "a c", "answer": "b"}
    data = write_rows(tmp_path / "data.jsonl", [row])
    line = said(capsys, tmp_path, "discover", "--task", str(data), "--bootstrap", "3", "--n", "9")
    assert "there is but one" in line
    data = write_rows(tmp_path / "data.jsonl", [row, row])
    line = said(capsys, tmp_path, "discover", "--task", str(data), "--bootstrap", "3", "--n", "9")
    assert LOADED in line


@pytest.mark.parametrize("finished", [True, False])
def test_another_run_is_not_resumed(
    finished: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    options = ACDCConfig(threshold=0.01, metric="kl", margin=0.2)
    header = {"model": "x", "task": "y", "precision": PAHQConfig().to_dict(), "acdc": options.to_dict()}
    data = {"name": "ioi", "examples": 4, **load_task("ioi", load_tokenizer("demo"), n=4).source}
    folder.mkdir()
    if finished:
        (folder / "circuit.json").write_text("{}")
        (folder / "discovery.json").write_text(json.dumps({"header": header, "task": data}))
    else:
        Journal.create(folder, header | {"data": data})
    for given, words in (
        (["--threshold", "0.02"], "its threshold is 0.01 there, 0.02 now"),
        (["--level", "node"], "its level is edge there, node now"),
        (["--precision", "fp32"], "its precision is pahq there, fp32 now"),
        (["--search", "budget", "--max-gap", "0.1"], "its search is acdc there, budget now"),
        (["--seed", "1"], "its prompts are others (seed 0 there, 1 now)"),
        (["--n", "5"], "its prompts are others (n 4 there, 5 now)"),
        (["--task", "ioi:s2_flip"], "(corruption abc there, s2_flip now)"),
        (["--task", "sva"], "(generator ioi there, sva now)"),
        ([], LOADED),
    ):
        line = said(capsys, tmp_path, "discover", *given, "--resume", "--out", str(folder))
        assert words in line and (words == LOADED or LOADED not in line)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["discover"], "circuit.png"),
        (["discover", "--edges", "9"], "learned.safetensors"),
        (["attribute", "--resume"], "means.safetensors"),
        (["discover", "--resume"], "seconds.json"),
        (["sweep", "--thresholds", "0.1,0.2"], "pareto.html"),
    ],
)
def test_somebodys_own_files_are_not_replaced(
    command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("{}")
    (tmp_path / "mine" / "README.md").write_text("# Mine")
    line = said(capsys, tmp_path, *command, "--out", str(tmp_path / "mine"))
    assert f"holds no run, but a file {name}, which a run would replace; choose another folder" in line
    assert (tmp_path / "mine" / name).read_text() == "{}"
    (tmp_path / "mine" / name).unlink()
    assert LOADED in said(capsys, tmp_path, *command, "--out", str(tmp_path / "mine"))


@pytest.mark.parametrize(
    "options",
    [
        ["discover", "--tests", "verified"],
        ["discover", "--screen", "eap-ig:0.1"],
        ["discover", "--edges", "9"],
        ["attribute"],
        ["sweep", "--thresholds", "0.1,0.2", "--tests", "verified"],
    ],
)
def test_so_is_a_metric_without_the_gradient_that_is_needed(
    options: list[str], count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(capsys, tmp_path, *options, "--metric", count)
    assert f"{count}" in line and "has no gradient" in line


def test_commands_without_a_search_ignore_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    evaluate = ["evaluate", run, "--model", "demo", "--task", "ioi", "--n", "2"]
    for command, words in (
        ([*evaluate, "--samples", "7"], "--samples are random subsets of --completeness"),
        (["export", run, "--rank", "absolute", "--out", out], "--rank is of --format mib-circuits"),
        (["tasks", "--revision", "main"], "are about a model: give --model too"),
    ):
        assert run_main(*command) == 2
        assert words in capsys.readouterr().err


def test_a_format_in_fp32_is_no_error(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Programs that choose a precision may give it with all of them."""
    assert run_main("info", "demo", "--precision", "fp32", "--format", "int8", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 4
    assert "--format int8 is of a low-precision regime" in caplog.text


def test_what_is_foreseen_of_generated_tasks_is_so() -> None:
    tokenizer = load_tokenizer("demo")
    for facts in DESCRIPTIONS:
        if facts.name == "docstring":  # the demo's tokenizer lacks its words
            continue
        task: Task = load_task(facts.name, tokenizer, n=2)
        assert task.has_answers and foreseen_metric(facts.name, None) == task.metric
        for name in ("logit_diff", "prob_diff"):
            if task.has_distractors:
                assert foreseen_metric(facts.name, name) == name
            else:
                with pytest.raises(MetricError, match="needs a distractor"):
                    foreseen_metric(facts.name, name)
    assert foreseen_metric("rows.jsonl", "logit_diff") == "logit_diff"
    assert foreseen_metric("rows.jsonl", None) is None
