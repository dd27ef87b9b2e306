"""`pahq evaluate --audit`: the decisions of any finished search, taken again in FP32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import Circuit
from pahq_hf.circuit.estimates import most_wrong
from pahq_hf.errors import CircuitError, ConfigError
from pahq_hf.evaluation.audit import Audited, check_auditable
from tests.helpers import run_main, wrapped
from tests.models import random_task
from tests.tiers import exhaustive

EARLIER = Path(__file__).parents[1] / "earlier"
TASK = random_task(batch=3, length=6, padding="right", seed=17, metric="kl")
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tests": "verified"}),
    ("llama", {"order": "head", "absolute": True}),
    ("llama", {"screen": "eap-ig:0.4"}),
    ("llama_split", {"readers": "a1*,m*", "ablation": "zero"}),
    ("gpt2", {"metric": "logit_diff", "ablation": "mean"}),
    ("gemma3", {"order": "head"}),
]


@pytest.mark.parametrize(("name", "options"), [*OPTIONS[:4], *(exhaustive(*row) for row in OPTIONS[4:])])
def test_edges_are_tested_where_the_search_decided_them(name: str, options: dict[str, Any]) -> None:
    """With a threshold that keeps everything every decision is wrong, and all scores are told."""
    model = wrapped(name)
    circuit = model.discover(TASK, threshold=0.05, progress=False, **options)
    facts = model.evaluate(circuit, TASK, audit=10_000)["audit"]
    removed = circuit.tested & ~circuit.kept
    assert facts["audited"] == facts["removed"] == removed.sum() > 5
    assert facts["wrong"] == 0 and facts["at_most"] == 0.0 and facts["edges"] == {}
    circuit.discovery["arguments"]["threshold"] = -1e9
    facts = model.evaluate(circuit, TASK, audit=10_000)["audit"]
    assert facts["wrong"] == facts["removed"] and facts["at_most"] == 1.0
    names = {circuit.graph.edge_name(int(r), int(w)): (int(r), int(w)) for r, w in np.argwhere(removed)}
    assert facts["edges"].keys() == names.keys()
    for edge, place in names.items():
        assert facts["edges"][edge]["score"] == circuit.scores[place]
        if not circuit.scored.is_estimate(*place):
            assert facts["edges"][edge]["exact"] == pytest.approx(circuit.scores[place], abs=1e-5), edge


def test_a_draw_says_how_many_are_wrong_at_most() -> None:
    model = wrapped("llama")
    circuit = model.discover(TASK, threshold=0.05, progress=False)
    removed = circuit.scores[circuit.tested & ~circuit.kept]
    tau = float(np.median(removed[removed > 0]))
    circuit.discovery["arguments"]["threshold"] = tau  # as if so many had been decided wrongly
    ours = [model.evaluate(circuit, TASK, audit=20, seed=seed)["audit"] for seed in (0, 0, 1)]
    assert ours[0] == ours[1] != ours[2]
    for facts in ours:
        assert facts["audited"] == 20 and facts["wrong"] == len(facts["edges"]) > 0
        assert facts["at_most"] == most_wrong(20, facts["wrong"])
        assert all(scores["exact"] >= tau > -1 for scores in facts["edges"].values())


def test_a_low_precision_run_is_told_what_fp32_decides() -> None:
    low, exact = wrapped("llama", regime="rtn"), wrapped("llama")
    circuit = low.discover(TASK, threshold=0.05, progress=False)
    facts = exact.evaluate(circuit, TASK, audit=10_000)["audit"]
    assert facts["regime"] == "rtn"
    assert low.evaluate(circuit, TASK, audit=10_000)["audit"] == facts  # whatever the model is kept in


@pytest.mark.parametrize(
    ("regime", "audited", "wrong", "text"),
    [
        ("fp32", 60, 0, "0 of 60 audited were wrong, at most 4.9 % are"),
        (None, 60, 1, "1 of 60 audited was wrong, at most 7.7 % are"),
        ("pahq", 60, 1, "FP32 decides 1 of 60 audited otherwise, at most 7.7 % are"),
        ("rtn", 90, 2, "FP32 decides 2 of 90 audited otherwise, of all there are"),
    ],
)
def test_the_words_of_an_audit(regime: str | None, audited: int, wrong: int, text: str) -> None:
    limit = most_wrong(audited, wrong)
    assert Audited(90, audited, 0, wrong, limit, regime).text == text


# -- on the command line ---------------------------------------------------------------------------------

EVALUATE = ("--model", "demo", "--task", "ioi", "--n", "4")


@pytest.mark.parametrize("version", ["first", "before_rooms"])
def test_runs_of_earlier_versions_are_audited(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(EARLIER / version / "discover")
    assert run_main("evaluate", run, *EVALUATE, "--audit", "60", "--json") == 0
    facts = json.loads(capsys.readouterr().out)["audit"]
    assert (facts["audited"], facts["wrong"], facts["regime"]) == (60, 0, "fp32")
    assert facts["at_most"] == most_wrong(60, 0)
    assert run_main("evaluate", run, *EVALUATE, "--audit", "60") == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "decisions like ACDC's 0 of 60 audited were wrong, at most 4.9 % are" in table


def test_other_prompts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run = str(EARLIER / "first" / "discover")
    assert run_main("evaluate", run, *EVALUATE, "--seed", "1", "--audit", "5") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pahq: an audit takes decisions again on the prompts of the search, and these are")
    assert "name ioi, n 4, seed 0" in line


@pytest.mark.parametrize("audit", ["-1", "x", "0.5"])
def test_a_number_of_edges_is_one(audit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("evaluate", str(EARLIER / "first" / "discover"), *EVALUATE, "--audit", audit) == 2
    assert "audit" in capsys.readouterr().err


@pytest.mark.parametrize("audit", [-1, 0.5, True])
def test_python_refuses_them_too(audit: Any) -> None:
    model = wrapped("llama")
    circuit = Circuit(model.graph, *([model.graph.no_edges()] * 3))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="audit"):
        model.evaluate(circuit, TASK, audit=audit)


def test_what_tells_no_decisions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attributed = EARLIER / "first" / "attribute"
    circuit = Circuit.from_pretrained(EARLIER / "first" / "discover")
    circuit.discovery = {}
    circuit.save_pretrained(tmp_path / "imported")
    cases = {
        str(attributed): "this circuit was found by 'eap-ig', which decides otherwise",
        str(tmp_path / "imported"): "does not say by which threshold and metric they were taken",
    }
    for run, told in cases.items():
        assert run_main("evaluate", run, *EVALUATE, "--audit", "5") == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pahq: ")]
        assert "an audit takes ACDC's decisions again" in line and told in line
    whole = Circuit.from_pretrained(EARLIER / "first" / "discover")
    whole.tested &= whole.kept
    with pytest.raises(CircuitError, match="has none that was tested"):
        check_auditable(whole)
