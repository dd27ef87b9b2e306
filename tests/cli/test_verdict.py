"""What a run says of its circuit at its end: on the screen, in its files, in Python."""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pahq_hf import Circuit, Sweep
from pahq_hf.circuit.verdict import Verdict
from pahq_hf.errors import CircuitError
from tests.helpers import id_rows, named, referee, run_main, save_tiny, wrapped, write_rows
from tests.models import VOCAB, random_task

TASK = random_task(batch=4, seed=21, metric="kl")
GOOD = Verdict("kl", 0.1, 0.0, 2.0, 0.9, 1.0, True, kept=30, live=28, total=82)


def taught(task: Any = TASK) -> Any:
    """The task with answers that the tiny Llama gives, so that it has a clean accuracy of 1."""
    model = wrapped("llama")
    logits = model(task.clean_ids, attention_mask=task.attention_mask).logits
    said = logits[task.answer_rows, task.answer_positions].argmax(-1).tolist()
    return replace(task, answers=tuple((token,) for token in said), distractors=((),) * len(said))


# -- when a circuit is poor ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "poor"),
    [
        ({}, False),
        ({"value": 0.4}, False),  # faithfulness .8
        ({"value": -0.4}, False),  # 1.2
        ({"value": 0.41}, True),
        ({"value": -0.41}, True),
        ({"value": 3.65, "empty": 4.46}, True),
        ({"accuracy": 0.8}, False),
        ({"accuracy": 0.79}, True),
        ({"accuracy": 0.4, "accuracy_full": 0.5}, False),
        ({"accuracy": 0.0, "accuracy_full": 0.0}, False),
        ({"value": 0.0, "empty": 0.0}, True),  # the metric tells nothing
    ],
)
def test_a_circuit_is_poor_by_faithfulness_or_accuracy(changes: dict[str, Any], poor: bool) -> None:
    verdict = replace(GOOD, **changes)
    assert verdict.poor is poor
    assert ("poor: " in verdict.summary) is poor
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


@pytest.mark.parametrize(
    ("counts", "kind", "said"),
    [
        ((0, 0), "empty", "an empty circuit"),
        ((5, 0), "disconnected", "no kept edge lies on a path"),
        ((82, 82), "whole", ": the whole model"),
        ((80, 80), "whole", "nearly the whole model"),
        ((40, 30), "circuit", "40 of 82 edges (10 dead)"),
    ],
)
def test_an_edge_set_is_called_what_it_is(counts: tuple[int, int], kind: str, said: str) -> None:
    verdict = replace(GOOD, kept=counts[0], live=counts[1])
    assert verdict.kind == kind and said in verdict.summary


@pytest.mark.parametrize(
    "changes",
    [
        {"value": "much"},
        {"value": float("nan")},
        {"kept": -1},
        {"kept": 1.5},
        {"metric": 3},
        {"has_answers": 1},
    ],
)
def test_a_damaged_verdict_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CircuitError, match="verdict is damaged"):
        Verdict.from_dict(GOOD.to_dict() | changes)


# -- what it measures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [True, False])
def test_a_discovery_measures_its_circuit(answers: bool, tmp_path: Path) -> None:
    model = wrapped("llama")
    task = taught() if answers else replace(TASK, answers=((),) * 4, distractors=((),) * 4)
    circuit = model.discover(task, threshold=0.3, out=tmp_path, progress=False)
    verdict = circuit.verdict
    assert verdict is not None and 0 < verdict.kept < verdict.total == 82
    judge = referee("llama", task)
    removed = judge.edge_set - named(circuit.graph, circuit.kept)
    said = judge.circuit_logits(removed).argmax(-1).tolist()
    full = judge.circuit_logits(set()).argmax(-1).tolist()
    right = [answer for (answer,) in task.answers] if answers else full
    assert verdict.accuracy == sum(a == b for a, b in zip(said, right, strict=True)) / 4
    assert verdict.accuracy_full == 1 and verdict.has_answers is answers
    assert verdict.value == pytest.approx(judge.metric(removed), abs=1e-5)
    assert verdict.dead == verdict.kept - int(circuit.live.sum())
    assert Circuit.from_pretrained(tmp_path).verdict == verdict
    assert json.loads((tmp_path / "discovery.json").read_text())["verdict"] == verdict.to_dict()


def test_an_attribution_and_a_sweep_have_verdicts(tmp_path: Path) -> None:
    model, task = wrapped("llama"), taught()
    circuit = model.attribute(task, method="eap-ig", topn=10, out=tmp_path / "eap")
    assert circuit.verdict is not None and circuit.verdict.kept == 10
    assert Circuit.from_pretrained(tmp_path / "eap").verdict == circuit.verdict
    sweep = model.sweep(task, thresholds=[0.1, 100.0], out=tmp_path / "sweep", progress=False)
    for row, circuit in zip(sweep.rows, sweep.values(), strict=True):
        assert row.verdict is not None and row.verdict == circuit.verdict
    assert [row["verdict"]["kind"] for row in sweep.to_json()["rows"]] == ["circuit", "empty"]
    assert Sweep.from_pretrained(tmp_path / "sweep").rows == sweep.rows
    alone = model.discover(task, threshold=0.1, progress=False)
    assert alone.verdict == sweep[0.1].verdict


# -- who hears it --------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_partial_search_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, task, out = wrapped("llama"), taught(), tmp_path / "out"
    circuit = model.discover(task, threshold=0.1, readers="logits", out=out, progress=False)
    logits = circuit.graph.reader_index("logits")
    kept, searched = int(circuit.kept[logits].sum()), int(circuit.graph.all_edges[logits].sum())
    assert 0 < kept < 0.9 * searched and circuit.verdict is not None
    told = f"{kept} of {searched} in the searched readers; all other edges are kept"
    assert told in circuit.verdict.summary and told in (out / "README.md").read_text()
    assert circuit.verdict.kind == "circuit"  # though most edges are kept
    assert Circuit.from_pretrained(out).verdict == circuit.verdict
    assert run_main("show", str(out)) == 0
    assert told in " ".join(capsys.readouterr().out.split())
    whole = model.discover(task, threshold=0.1, progress=False)
    assert whole.verdict is not None and whole.verdict.part is None


def test_a_poor_circuit_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, task = wrapped("llama"), taught()
    model.discover(task, threshold=100.0, progress=False)
    (warning,) = warnings_of(caplog)
    assert "tau 100" in warning and "an empty circuit" in warning and "faithfulness 0.000 is not" in warning
    caplog.clear()
    model.discover(task, threshold=1e-4, progress=False)
    assert not any("poor" in text for text in warnings_of(caplog))


def test_a_model_that_cannot_do_the_task_is_told_before_the_search(caplog: pytest.LogCaptureFixture) -> None:
    model, task = wrapped("llama"), taught()
    wrong = replace(task, answers=tuple(((answer + 1) % VOCAB,) for (answer,) in task.answers))
    for run in (
        lambda: model.discover(wrong, threshold=0.3, progress=False),
        lambda: model.sweep(wrong, thresholds=[0.3], progress=False),
        lambda: model.attribute(wrong, method="eap-ig", topn=5),
        lambda: model.attribute(wrong, method="exact", topn=5),
    ):
        caplog.clear()
        run()
        texts = warnings_of(caplog)
        assert "accuracy on the clean prompts is 0.00, near chance (0.17)" in texts[0]
        assert sum("near chance" in text for text in texts) == 1
    caplog.clear()
    model.discover(task, threshold=0.3, progress=False)
    assert not any("near chance" in text for text in warnings_of(caplog))


# -- the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdict")
    save_tiny(folder / "model")
    write_rows(folder / "ids.jsonl", id_rows(taught()))
    return folder


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run_main(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_an_empty_circuit_is_called_one_everywhere(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(root / "model"), "--task", str(root / "ids.jsonl"), "--precision", "fp32"]
    out = str(tmp_path / "run")
    assert run_main("discover", *where, "--threshold", "100", "--out", out) == 0  # finished, though poor
    printed = capsys.readouterr().out
    assert "an empty circuit, poor:" in printed and f"Result: {out}\n" in printed
    (command,) = (line for line in printed.splitlines() if line.startswith("Next:"))
    assert "--threshold 33.0" in command and f"--out {out}-lower" in command
    assert run_main("show", out) == 0
    assert "an empty circuit, poor:" in capsys.readouterr().out
    shown = run_json(capsys, "show", out)
    assert shown["discovery"]["verdict"]["poor"] is True
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| verdict, on the prompts of the search | an empty circuit, poor:" in card
    # finished already: the same is said again
    again = run_json(capsys, "discover", *where, "--threshold", "100", "--out", out, "--resume")
    assert again["verdict"] == shown["discovery"]["verdict"]


@pytest.mark.parametrize("command", [["discover", "--threshold", "100"], ["sweep", "--thresholds", "100"]])
def test_a_poor_verdict_is_said_once(
    command: list[str],
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the table where there is one, else in the log."""
    name, *options = command
    where = [name, str(root / "model"), "--task", str(root / "ids.jsonl"), "--precision", "fp32", *options]
    assert run_main(*where, "--out", str(tmp_path / "table")) == 0
    assert "empty" in capsys.readouterr().out
    assert not any("tau 100" in record.getMessage() for record in caplog.records)
    assert run_main(*where, "--out", str(tmp_path / "json"), "--json") == 0
    assert sum("tau 100" in record.getMessage() for record in caplog.records) == 1


def test_an_older_circuit_without_a_verdict_is_shown(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(root / "model"), "--task", str(root / "ids.jsonl"), "--precision", "fp32"]
    out = tmp_path / "run"
    assert run_main("discover", *where, "--threshold", "0.3", "--out", str(out), "--json") == 0
    facts = json.loads((out / "discovery.json").read_text())
    del facts["verdict"]
    (out / "discovery.json").write_text(json.dumps(facts))
    capsys.readouterr()
    assert Circuit.from_pretrained(out).verdict is None
    assert run_main("show", str(out)) == 0
    assert "faithfulness" not in capsys.readouterr().out
    Circuit.from_pretrained(out).save_pretrained(tmp_path / "again")
    assert "faithfulness" not in (tmp_path / "again" / "README.md").read_text()
    assert run_main("discover", *where, "--threshold", "0.3", "--out", str(out), "--resume", "--json") == 0
    facts["verdict"] = GOOD.to_dict() | {"accuracy": "high"}
    (out / "discovery.json").write_text(json.dumps(facts))
    assert run_main("show", str(out)) == 2
    assert "discovery.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "next_words"),
    [
        (["discover", "--threshold", "100"], ["discover", "--threshold", "33.0"]),
        (["attribute"], ["attribute", "--topn", "4"]),
        (["attribute", "--method", "random", "--topn", "3"], ["attribute", "--topn", "6"]),
        (["sweep", "--thresholds", "90,100"], ["sweep", "--thresholds", "10.0,30.0,90.0,100.0", "--resume"]),
    ],
)
def test_the_next_command_runs(
    options: list[str],
    next_words: list[str],
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, *rest = options
    where = [str(root / "model"), "--task", str(root / "ids.jsonl"), "--precision", "fp32"]
    facts = run_json(capsys, command, *where, *rest, "--token", "secret", "--out", str(tmp_path / "run 1"))
    words = shlex.split(facts["next"])
    assert words[0] == "pahq" and set(next_words) <= set(words) and "secret" not in words
    assert "--precision" in words
    assert run_main(*words[1:]) == 0


def test_a_good_circuit_is_judged_next_on_new_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    options = ["--task", "gendered_pronoun", "--n", "3", "--threshold", "0.05", "--precision", "fp32"]
    facts = run_json(capsys, "discover", "demo", *options, "--seed", "4", "--out", out)
    assert facts["verdict"]["poor"] is False and facts["verdict"]["accuracy_full"] == 1
    words = shlex.split(facts["next"])
    assert words[1:] == [*("evaluate", out, "--model", "demo", "--task", "gendered_pronoun"), *words[7:]]
    judged = run_json(capsys, *words[1:])
    assert judged["examples"] == 3 and words[words.index("--seed") + 1] == "5"


def test_the_table_of_a_sweep_fits_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--thresholds", "0.05,100", "--task", "gendered_pronoun", "--metric", "kl", "--n", "2"]
    assert run_main("sweep", "demo", *options, "--precision", "fp32", "--out", str(tmp_path / "s")) == 0
    table = capsys.readouterr().out.partition("Result:")[0]
    assert (
        "…" not in table
        and "faithful" in table.splitlines()[2]
        and table.splitlines()[3].split()[-1] == "empty"
    )
