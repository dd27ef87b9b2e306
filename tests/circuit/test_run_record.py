"""What a run's record and a model's identity read from files of any version, and what they write."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pahq_hf import AttributionConfig, Circuit, PAHQModel, load_task
from pahq_hf.circuit.card import render_card
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.run_record import (
    AppliedFacts,
    EdgeCounts,
    MetricFacts,
    RunRecord,
    SearchArguments,
    TaskFacts,
)
from pahq_hf.errors import CircuitError


@cache
def _tokenizer() -> Any:
    return PAHQModel.from_pretrained("demo", precision="fp32").tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a search and of an attribution."""
    folder = tmp_path_factory.mktemp("runs")
    model = PAHQModel.from_pretrained("demo", precision="fp32")
    task = load_task("ioi", model.tokenizer, n=2)
    model.discover(task, threshold=0.2, out=folder / "acdc")
    model.attribute(task, method="eap", metric="logit_diff", topn=50, out=folder / "eap")
    return {"acdc": folder / "acdc", "eap": folder / "eap"}


@pytest.mark.parametrize("method", ["acdc", "eap"])
def test_a_record_is_the_file_it_was_read_from(runs: dict[str, Path], method: str) -> None:
    document = json.loads((runs[method] / "discovery.json").read_text())
    record = RunRecord.from_json(document)
    assert json.dumps(record.to_json(), indent=2) == json.dumps(document, indent=2)  # and in its order
    assert record.method == method and set(record.more) == {"checksums"}


def test_a_circuit_of_this_version_is_read_without_a_word(
    runs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    Circuit.from_pretrained(runs["acdc"])
    assert caplog.records == []


def test_a_circuit_tells_its_run_by_fields(runs: dict[str, Path]) -> None:
    circuit = Circuit.from_pretrained(runs["acdc"])
    record, facts = circuit.record, circuit.discovery
    assert record.title == "ACDC with activation patching" and record.ranks_kept_first
    assert record.arguments.threshold == 0.2 and record.arguments.topn is None
    assert record.task.name == "ioi" and record.task.examples == 2
    assert record.edges.kept == circuit.edge_count == int(circuit.scored.kept.sum())
    assert record.edges.tested == facts["edges"]["tested"]
    assert record.metric.fp32 == facts["metric"]["fp32"] and record.precision.regime == "fp32"
    assert record.total_seconds == facts["seconds"]["total"]
    assert record.verdict == circuit.verdict is not None and record.verified is True
    assert record.apply.accuracy == facts["apply"]["accuracy"]
    identity = circuit.identity
    assert identity.base_model == "demo" and identity.fingerprint == circuit.model["fingerprint"]
    assert list(identity.to_json().items()) == list(circuit.model.items())


def test_an_attribution_tells_what_it_was_asked_for(runs: dict[str, Path]) -> None:
    record = Circuit.from_pretrained(runs["eap"]).record
    assert record.title == "edge attribution patching (EAP)" and not record.ranks_kept_first
    assert record.arguments.topn == 50 and record.arguments.threshold is None
    assert "threshold" in record.arguments and "tau" not in record.arguments
    asked = AttributionConfig(method="eap", topn=50, metric="logit_diff")
    assert record.arguments.to_json() == asked.to_dict()


def test_what_a_newer_version_wrote_is_kept() -> None:
    document = {
        "method": "refine",
        "title": "refining",
        "ranks_kept_first": True,
        "metric": {"name": "kl", "full": 0.5, "spread": [1, 2]},
        "arguments": {"edges": 200, "threshold": None},
        "rounds": {"accepted": 7},
    }
    record = RunRecord.from_json(document)
    assert record.metric.full == 0.5 and record.title == "refining"
    assert record.to_json() == document
    assert ModelIdentity.from_json({"base_model": "me/gpt2", "shards": 3}).to_json() == {
        "base_model": "me/gpt2",
        "shards": 3,
        "local": False,
        "revision": None,
    }


WRONG: list[dict[str, Any]] = [
    {"method": 3},
    {"metric": {"full": "much", "name": ["kl"], "fp32": True}},
    {"edges": {"tested": 1.5}},
    {"seconds": {"total": "long"}},
    {"versions": ["torch"], "screen": 4, "apply": "well", "reused": None},
    {"evaluations": "many", "verified": "yes", "kl": "low", "verdict": None},
    {"task": {}, "arguments": {}},
]


@pytest.mark.parametrize("document", WRONG)
def test_a_value_of_another_type_is_unknown_and_kept(document: dict[str, Any]) -> None:
    record = RunRecord.from_json(document)
    assert record.to_json() == document
    known = (record.metric, record.edges, record.apply, record.task, record.arguments)
    assert all(not section.to_json().keys() - section.more.keys() for section in known)
    numbers = (record.total_seconds, record.evaluations, record.kl, record.verified, record.confirmation)
    assert all(value is None for value in numbers)


@pytest.mark.parametrize("document", [{"metric": 3}, {"arguments": None}, {"task": []}, {"verdict": 5}])
def test_damage_is_named(document: dict[str, Any]) -> None:
    with pytest.raises(CircuitError, match=f"{next(iter(document))}.*does not hold an object"):
        RunRecord.from_json(document)


def test_a_value_that_was_to_be_confirmed_is_missed() -> None:
    record = RunRecord.from_json({"verified": True, "metric": {"name": "kl", "final": 0.1}})
    with pytest.raises(CircuitError, match="facts of verification are damaged"):
        assert record.confirmation


def test_a_search_of_ones_own_says_what_it_is() -> None:
    """A name that no version knows tells nothing, so it is written down."""
    record = RunRecord(
        method="mine",
        title="my search",
        ranks_kept_first=True,
        task=TaskFacts(name="ioi", examples=4, more={"seed": 0}),
        arguments=SearchArguments(threshold=0.1, more={"rounds": 3}),
        edges=EdgeCounts(total=10, kept=2),
        apply=AppliedFacts(accuracy={"zero": 0.5}),
        metric=MetricFacts(name="kl", full=0),
    )
    document = record.to_json()
    assert document == {
        "method": "mine",
        "title": "my search",
        "ranks_kept_first": True,
        "task": {"name": "ioi", "examples": 4, "seed": 0},
        "arguments": {"threshold": 0.1, "rounds": 3},
        "edges": {"total": 10, "kept": 2},
        "apply": {"accuracy": {"zero": 0.5}},
        "metric": {"name": "kl", "full": 0},
    }
    assert RunRecord.from_json(json.loads(json.dumps(document))) == record
    old = RunRecord.from_json({"method": "mine"})
    assert (old.title, old.ranks_kept_first) == ("mine", False)


def test_a_model_on_the_hub_keeps_its_revision() -> None:
    found = ModelIdentity.from_json({"base_model": "me/gpt2", "local": False, "revision": "a" * 40})
    assert found.hub_id == "me/gpt2" and found.with_base_model("me/gpt2") == found
    other = found.with_base_model("you/gpt2")
    assert (other.hub_id, other.revision) == ("you/gpt2", None)
    folder = ModelIdentity.from_json({"base_model": "/home/me/secret/gpt2"})
    assert (folder.base_model, folder.local, folder.hub_id) == ("gpt2", True, None)


@pytest.mark.parametrize("name", ["ioi", "greater_than", "induction", "sva"])
def test_the_card_names_prompts_that_can_be_made_again(name: str, runs: dict[str, Path]) -> None:
    circuit = Circuit.from_pretrained(runs["acdc"])
    task = load_task(name, _tokenizer(), n=2)
    circuit.discovery = circuit.discovery | {"task": {"name": task.name, "examples": 2, **task.source}}
    found = re.search(r"load_task\('([^']*)', model.tokenizer", render_card(circuit))
    assert found is not None
    assert load_task(found[1], _tokenizer(), n=2).fingerprint() == task.fingerprint()
    for hostile in ("ioi\n```", "ioi'), exit(1", 3):
        circuit.discovery["task"]["generator"] = hostile
        assert "load_task" not in render_card(circuit)


def test_a_part_of_a_bootstrap_that_is_not_confirmed_is_a_doubt() -> None:
    """The command line ends with exit code 1 by it."""
    metric = {"name": "kl", "final": 0.5, "final_recomputed": 0.5, "tolerance": 1e-5}

    def doubt(**facts: object) -> str | None:
        told = {"resamples": 20, "unconfirmed": 0, "consensus_verified": True} | facts
        return RunRecord.from_json({"metric": metric, "verified": True, "bootstrap": told}).doubt

    assert doubt() is None
    assert "not verified: 2 of 20 resamples; please" in str(doubt(unconfirmed=2))
    assert "not verified: the consensus; please" in str(doubt(consensus_verified=False))
