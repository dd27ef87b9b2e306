"""What comes next after a run of a search, and what is said of what it was asked for."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import Circuit
from pahq_hf.cli.declared import Command, chosen_options, turned
from pahq_hf.cli.discover import discover
from pahq_hf.errors import ConfigError
from pahq_hf.search.registry import find_search
from tests.helpers import files_of, run_main, wrapped
from tests.models import random_task
from tests.tiers import exhaustive


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    assert run_main(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


DEMO = ["demo", "--task", "gendered_pronoun", "--n", "2", "--precision", "fp32"]


@pytest.mark.parametrize(
    ("search", "options", "more", "fewer"),
    [
        ("acdc", {"threshold": 0.3}, {"threshold": 0.1}, {"threshold": 0.9}),
        # No tau is lower than 0: what a removal of all takes away, a budget bounds.
        (
            "acdc",
            {"threshold": 0.0, "tests": "verified"},
            {"search": "budget", "max_gap": 0.1} | dict.fromkeys(("threshold", "screen", "tests", "audit")),
            {"threshold": 0.003},
        ),
        ("budget", {"max_gap": 0.3}, {"max_gap": 0.1}, {"max_gap": 0.9}),
        ("budget", {"max_gap": math.inf, "threshold": 0.1}, {"max_gap": 0.1}, {"threshold": 0.3}),
        ("budget", {"max_gap": math.inf}, {"max_gap": 0.1}, None),
        ("budget", {"max_gap": 0.0}, None, {"max_gap": 0.003}),
        ("refine", {"edges": 100}, {"edges": 200}, {"edges": 23}),
        ("refine", {"edges": 300}, {"edges": 479}, {"edges": 23}),
        ("refine", {"edges": 479}, None, {"edges": 23}),
        ("refine", {"max_gap": 0.3}, {"max_gap": 0.1}, {"max_gap": 0.9}),
        ("refine", {"max_gap": 0.6}, {"max_gap": 0.2}, None),
        ("refine", {"curve": True}, None, None),
        ("ugs", {"edges": 100}, {"edges": 200}, {"edges": 23}),
        ("edge-pruning", {"edges": 479}, None, {"edges": 23}),
    ],
)  # fmt: skip
def test_another_run_that_may_do_better_is_known(
    search: str, options: dict[str, Any], more: dict[str, Any] | None, fewer: dict[str, Any] | None
) -> None:
    kind = find_search(search)
    asked = kind.make_options(options)
    assert turned(kind, asked, more=True, total=479) == more
    assert turned(kind, asked, more=False, total=479) == fewer


@pytest.mark.parametrize(
    ("options", "next_words"),
    [
        exhaustive(["--threshold", "0", "--absolute"], ["discover", "--threshold", "0.003"]),
        (["--edges", "1", "--steps", "0"], ["discover", "--edges", "2", "--steps", "0"]),
        (["--search", "budget", "--max-gap", "inf", "--threshold", "50"], ["discover", "--max-gap", "0.1"]),
        exhaustive(["--search", "refine", "--curve", "--steps", "0"], ["evaluate", "--curve"]),
    ],
)
def test_the_next_command_runs(
    options: list[str], next_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = run_json(capsys, "discover", *DEMO, *options, "--out", str(tmp_path / "run"))
    words = shlex.split(facts["next"])
    assert words[0] == "pahq" and set(next_words) <= set(words)
    assert run_main(*words[1:]) == 0


# -- what was asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (
            ["--edges", "9", "--steps", "0", "--noise-seed", "3"],
            ["most edges 9", "steps 0", "seed 3", "locally minimal", "round taken", "on searched pairs"],
        ),
        exhaustive(
            ["--search", "refine", "--max-gap", "0.25", "--steps", "0"], ["max gap 0.25", "steps 0", "seed 0"]
        ),
        (["--search", "budget", "--max-gap", "0.2"], ["threshold inf", "max gap 0.2", "largest gap allowed"]),
        exhaustive(
            ["--search", "budget", "--max-gap", "inf", "--threshold", "9"], ["threshold 9", "max gap inf"]
        ),
        (["--threshold", "9"], ["threshold 9"]),
    ],
)  # fmt: skip
def test_table_card_and_page_say_what_was_asked_for(
    options: list[str], rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run_main("discover", *DEMO, *options, "--out", str(out)) == 0
    table = " ".join(capsys.readouterr().out.split())
    card = re.sub(r"[|\s]+", " ", (out / "README.md").read_text())
    assert run_main("show", str(out), "--html", str(tmp_path / "page.html")) == 0
    page = (tmp_path / "page.html").read_text()
    for row in rows:
        assert row in table and row.removesuffix(".0") in card.replace("9.0", "9"), row
        assert row.rpartition(" ")[0].strip() in page
    assert ("threshold" in card) == ("--edges" not in options and "refine" not in options)


def test_a_bound_of_nothing_is_told_too(tmp_path: Path) -> None:
    model = wrapped("llama", layers=1)
    circuit = model.discover(
        random_task(), search="budget", max_gap=math.inf, threshold=1.0, out=tmp_path / "run", progress=False
    )
    assert circuit.discovery["budget"]["bound"] == "inf"
    assert Circuit.from_pretrained(tmp_path / "run").discovery["budget"]["bound"] == "inf"


# -- a finished run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--threshold", "9"], ["--edges", "5", "--steps", "0"]])
def test_a_lost_card_or_picture_is_made_again(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["discover", *DEMO, *options, "--out", str(out)]
    assert run_main(*command) == 0
    before = files_of(out)
    (out / "README.md").unlink()
    assert run_main(*command, "--resume") == 0
    assert files_of(out) == before
    (out / "README.md").write_text("by hand")
    (out / "circuit.png").unlink()
    assert run_main(*command, "--resume") == 0
    assert (out / "README.md").read_text() == "by hand" and (out / "circuit.png").exists()
    capsys.readouterr()


@pytest.mark.parametrize("option", ["resume", "take_over"])
@pytest.mark.parametrize("method", ["discover", "attribute", "sweep"])
def test_what_is_about_a_folder_needs_one(option: str, method: str) -> None:
    more = {"thresholds": [0.1]} if method == "sweep" else {}
    with pytest.raises(
        ConfigError, match=rf"{option}=True is about the run in a folder: say which, out=\.\.\."
    ):
        getattr(wrapped("llama", layers=1), method)(random_task(), **{option: True}, **more)


# -- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["acdc", "budget", "refine"])
def test_an_unknown_option_names_the_search(search: str) -> None:
    with pytest.raises(ConfigError, match=f"search '{search}' of discover has no option 'bound'"):
        wrapped("llama", layers=1).discover(random_task(), search=search, bound=1)


def test_an_option_of_several_searches_says_what_each_means() -> None:
    command = Command(discover, lambda: map(find_search, ("acdc", "budget", "refine")))
    said = {}
    for name, parameter in command.__signature__.parameters.items():
        for fact in getattr(parameter.annotation, "__metadata__", ()):
            said[name] = fact.help or ""
    assert re.search("budget: How far .* refine: The smallest circuit", said["max_gap"])
    assert said["threshold"].startswith("acdc, budget: tau") and said["edges"].startswith("refine: Keep")
    assert ":" not in said["metric"].partition(" ")[0]


def test_an_option_that_a_search_lacks_is_called_as_it_was_typed() -> None:
    with pytest.raises(ConfigError, match=r"search 'acdc' takes no --search-seed$"):
        chosen_options(find_search("acdc"), {"search_seed": 7})


@pytest.mark.parametrize(
    ("search", "given", "advice"),
    [
        ("acdc", {"edges": 10}, "it is an option of search refine and edge-pruning and ugs"),
        ("refine", {"readers": "m*"}, "it is an option of search acdc and budget"),
        ("refine", {"tests": "verified"}, "it is an option of search acdc"),
        ("refine", {"noise_seed": 0}, "in Python it is 'seed'"),
        ("refine", {"edgse": 10}, "did you mean 'edges'?"),
    ],
)
def test_what_another_search_takes_is_called_that(search: str, given: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(advice)}$"):
        wrapped("llama", layers=1).discover(random_task(), search=search, **given)


@pytest.mark.parametrize(
    ("option", "takers"), [("edges", "refine and edge-pruning and ugs"), ("max_gap", "budget and refine")]
)
def test_the_command_line_says_which_search_takes_an_option(option: str, takers: str) -> None:
    with pytest.raises(ConfigError, match=f", which is of --search {takers}$"):
        chosen_options(find_search("acdc"), {option: 1})


def test_numpys_numbers_are_numbers() -> None:
    model, task = wrapped("llama", layers=1), random_task()
    found = model.discover(task, edges=np.int64(4), steps=np.int32(0), progress=False)
    assert found.discovery["arguments"]["edges"] == 4
    with pytest.raises(ConfigError, match="edges must be a whole number from 1 on"):
        model.discover(task, edges=np.bool_(True), steps=0)


def test_members_are_of_an_ensemble() -> None:
    with pytest.raises(ConfigError, match="members are of method ensemble; the method is gim"):
        wrapped("gpt2").attribute(random_task(), method="gim", members="eap,hisp", metric="nll")


def test_a_run_in_both_directions_that_stopped_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no journal of its own: its two runs have."""
    words = ["discover", "demo", "--task", "sva", "--n", "2", "--readers", "logits", "--threshold", "0.1"]
    words += ["--direction", "both", "--out", str(tmp_path / "run")]
    assert run_main(*words) == 0
    (tmp_path / "run" / "circuit.json").unlink()
    capsys.readouterr()
    assert run_main(*words, "--resume") == 0
    assert "starting one" not in capsys.readouterr().err
