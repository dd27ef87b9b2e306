"""Runs with verified estimates: what they record, show, keep and resume."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pahq_hf import Circuit, PAHQModel, Sweep
from pahq_hf.circuit.card import render_card
from pahq_hf.circuit.estimates import EstimateFacts, most_wrong, percent
from pahq_hf.circuit.render.page import circuit_page
from pahq_hf.config import EngineConfig
from pahq_hf.engine.protocol import Slopes
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import CircuitError, RunError
from pahq_hf.search import intervals
from pahq_hf.search.intervals import IntervalRule
from tests.helpers import (
    FILES,
    assert_same_circuit,
    files_of,
    id_rows,
    journal_lines,
    run_main,
    save_tiny,
    signalled,
    wrapped,
    write_rows,
)
from tests.models import random_task
from tests.search.runs import interrupted
from tests.tiers import exhaustive

TASK = random_task(batch=3, length=6, padding="right", seed=17, metric="kl")
OPTIONS: dict[str, Any] = {"threshold": 0.05, "tests": "verified"}


def deep() -> PAHQModel:
    return wrapped("llama", layers=4)


def discover(model: PAHQModel, out: Path | None = None, **options: Any) -> Circuit:
    return model.discover(TASK, out=out, progress=False, **(OPTIONS | options))


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with verified estimates; nothing may change it."""
    folder = tmp_path_factory.mktemp("verified") / "out"
    discover(deep(), folder)
    return folder


# -- the record ------------------------------------------------------------------------------------------


def test_the_record_says_what_was_tested_estimated_and_audited(verified: Path) -> None:
    circuit = Circuit.from_pretrained(verified)
    facts, edges = circuit.discovery["estimates"], circuit.discovery["edges"]
    steps = [json.loads(line) for line in journal_lines(verified)[1:]]
    assert set(facts) == {"tests", "estimated", "gradients", "audited", "wrong", "at_most"}
    assert facts["estimated"] == sum(len(step.get("estimated", ())) for step in steps) > 50
    assert facts["tests"] + facts["estimated"] == edges["tested"]
    assert edges["tested"] + edges["untested"] == edges["total"]
    for name in ("gradients", "audited", "wrong"):
        assert facts[name] == sum(step.get("counts", {}).get(name, 0) for step in steps)
    assert facts["at_most"] == most_wrong(facts["audited"], facts["wrong"])
    assert circuit.record.estimates == EstimateFacts(**facts)
    every = discover(deep(), tests="all")
    assert "estimates" not in every.discovery and every.estimated is None
    assert every.record.estimates.text is None


def test_estimated_scores_are_flagged(verified: Path, tmp_path: Path) -> None:
    circuit = Circuit.from_pretrained(verified)
    assert circuit.estimated is not None and circuit.estimated.sum() == circuit.record.estimates.estimated
    assert not (circuit.estimated & (circuit.kept | ~circuit.tested)).any()
    flags = load_file(verified / "scores.safetensors")["estimated"]
    assert np.array_equal(flags.astype(bool), circuit.estimated)
    every = discover(deep(), tmp_path / "all", tests="all")
    exact = circuit.tested & ~circuit.estimated
    np.testing.assert_allclose(circuit.scores[exact], every.scores[exact], atol=1e-5)
    assert "estimated" not in load_file(tmp_path / "all" / "scores.safetensors")
    circuit.save_pretrained(tmp_path / "again")
    again = Circuit.from_pretrained(tmp_path / "again")
    assert again.estimated is not None and np.array_equal(again.estimated, circuit.estimated)


def test_flags_that_cannot_be_are_refused(verified: Path, tmp_path: Path) -> None:
    circuit = Circuit.from_pretrained(verified)
    circuit.estimated = ~circuit.tested
    circuit.save_pretrained(tmp_path / "out")
    with pytest.raises(CircuitError, match="marked as estimated and not as tested"):
        Circuit.from_pretrained(tmp_path / "out")


def test_pages_cards_and_tables_say_how_sure_it_is(
    verified: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    circuit = Circuit.from_pretrained(verified)
    text = circuit.record.estimates.text
    assert text is not None and f"0 of {circuit.record.estimates.audited} audited were wrong, at most" in text
    assert run_main("show", str(verified)) == 0
    shown = capsys.readouterr().out
    assert "decisions like ACDC's" in shown and text in shown
    assert f"| decisions like ACDC's | {text} |" in render_card(circuit)
    assert text in circuit_page(circuit)
    circuit.estimated = circuit.kept.copy()  # as a search of one's own may do
    assert '"estimated":[[1,1,' in circuit_page(circuit).replace(" ", "")


@pytest.mark.parametrize("limit", [math.nan, -1.0, 7.0, None])
def test_a_limit_that_is_no_share_is_not_believed(limit: float | None) -> None:
    facts = EstimateFacts(tests=1, estimated=500, gradients=9, audited=300, wrong=0, at_most=limit)
    assert facts.text == "0 of 300 audited were wrong, at most 1 % are"
    assert replace(facts, wrong=-5).text is None and replace(facts, wrong=301).text is None


@pytest.mark.parametrize(
    ("audited", "wrong", "text"),
    [
        (300, 0, "0 of 300 audited were wrong, at most 1 % are"),
        (60, 0, "0 of 60 audited were wrong, at most 4.9 % are"),
        (300, 1, "1 of 300 audited was wrong and is mended, at most 1.6 % of the others are"),
        (1200, 3, "3 of 1,200 audited were wrong and are mended, at most 0.65 % of the others are"),
        (1, 0, "0 of 1 audited were wrong, at most 95 % are"),
        (2000, 0, "0 of 2,000 audited were wrong, and all were audited"),
        (2001, 1, "1 of 2,001 audited was wrong and is mended, and all were audited"),
        (0, 0, "not audited"),
    ],
)
def test_the_words_of_an_audit(audited: int, wrong: int, text: str) -> None:
    limit = most_wrong(audited, wrong)
    facts = EstimateFacts(tests=10, estimated=2000, gradients=9, audited=audited, wrong=wrong, at_most=limit)
    assert facts.text == text
    assert facts.shares == "10 tests, 2,000 estimates"


def test_without_estimates_there_is_nothing_to_audit() -> None:
    facts = EstimateFacts(tests=1, estimated=0, gradients=0, audited=0, wrong=0, at_most=0.0)
    assert (facts.text, facts.shares) == ("all were tested", "1 test, 0 estimates")
    assert EstimateFacts().text is None


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (0.009936, "1 %"), (0.0101, "1.1 %"), (1.0, "100 %"), (0.02, "2 %")]
)
def test_percents_never_claim_more_than_the_limit(share: float, text: str) -> None:
    assert percent(share) == text


# -- going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("regime", "step"), [("fp32", 13), exhaustive("fp32", 1), exhaustive("pahq", 5)])
def test_resuming_at_any_reader_gives_the_same_bytes(tmp_path: Path, regime: str, step: int) -> None:
    model, whole = wrapped("llama", layers=4, regime=regime), tmp_path / "whole"
    discover(model, whole)
    for records in range(2, len(journal_lines(whole)), step):
        folder = interrupted(whole, tmp_path / str(records), records)
        circuit = discover(model, folder, resume=True)
        assert circuit.discovery["resumed_readers"] == records
        assert_same_circuit(circuit, Circuit.from_pretrained(whole))
        assert circuit.discovery["estimates"] == Circuit.from_pretrained(whole).discovery["estimates"]
        assert files_of(folder).keys() == FILES
        for name in ("journal.jsonl", "circuit.json", "scores.safetensors"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("lines", [3, 9, 17])
def test_kill_9_and_resume(tmp_path: Path, lines: int) -> None:
    model = save_tiny(tmp_path / "model", layers=4)
    data = write_rows(tmp_path / "task.jsonl", id_rows(random_task(batch=8, length=16, seed=23)))
    options = ["--task", str(data), "--threshold", "0.05", "--tests", "verified", "--metric", "kl"]

    def arguments(out: str, *more: str) -> list[str]:
        return ["discover", str(model), *options, "--out", str(tmp_path / out), "--json", *more]

    assert run_main(*arguments("whole")) == 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert Circuit.from_pretrained(whole).discovery["estimates"]["estimated"] > 20
    code, _, _ = signalled(arguments("killed"), killed / "journal.jsonl", lines, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert len(journal_lines(killed)) < len(journal_lines(whole))
    assert run_main(*arguments("killed", "--resume")) == 0
    for name in ("journal.jsonl", "circuit.json", "scores.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


class Stop(Exception):
    """What ends a run on the way."""


@pytest.mark.parametrize("after", [1, 4, 11])
def test_a_run_that_ends_within_a_readers_intervals_goes_on(
    verified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """At a measurement of slopes: the reader is decided again from its beginning, and alike."""
    left, slopes = [after], SparseEngine.slopes

    def ending(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return slopes(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SparseEngine, "slopes", ending)
        with pytest.raises(Stop):
            discover(deep(), tmp_path / "out")
    folder = tmp_path / "out"
    assert not (folder / "circuit.json").exists()
    assert len(journal_lines(folder)) < len(journal_lines(verified))
    discover(deep(), folder, resume=True)
    for name in ("journal.jsonl", "circuit.json", "scores.safetensors"):
        assert (folder / name).read_bytes() == (verified / name).read_bytes(), name


def step_with_estimates(lines: list[bytes]) -> int:
    return next(n for n, line in enumerate(lines) if n > 1 and json.loads(line).get("estimated"))


Change = Callable[[dict[str, Any]], dict[str, Any]]
DAMAGE: dict[str, tuple[Change, str]] = {
    "a kept edge": (lambda s: {"estimated": sorted([*s["estimated"], *s["kept"], 999])}, "estimate"),
    "twice": (lambda s: {"estimated": s["estimated"][:1] + s["estimated"]}, "estimate"),
    "no list": (lambda s: {"estimated": 3}, "iterable"),
    "negative": (lambda s: {"counts": s["counts"] | {"gradients": -1}}, "counts"),
    "no gradients": (lambda s: {"counts": s["counts"] | {"gradients": 0}}, "counts"),
    "more wrong than audited": (lambda s: {"counts": s["counts"] | {"audited": 0, "wrong": 1}}, "counts"),
    "more audited than estimated": (lambda s: {"counts": s["counts"] | {"audited": 9999}}, "counts"),
    "a fraction": (lambda s: {"counts": s["counts"] | {"audited": 0.5}}, "another type"),
    "another count": (lambda s: {"counts": s["counts"] | {"others": 1}}, "others"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_journal_is_refused(
    verified: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, told = DAMAGE[case]
    lines = [json.loads(line) for line in journal_lines(verified)]
    for line in lines:
        del line["check"]  # as somebody would who alters it
    number = step_with_estimates(journal_lines(verified))
    lines[number] |= change(lines[number])
    raw = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    (tmp_path / "journal.jsonl").write_bytes(raw)
    with pytest.raises(RunError, match=rf"journal\.jsonl is damaged .*{told}"):
        discover(deep(), tmp_path, resume=True)
    assert files_of(tmp_path) == {"journal.jsonl": raw}


def test_estimates_in_a_journal_of_a_run_without_them_are_refused(tmp_path: Path) -> None:
    discover(deep(), tmp_path / "all", tests="all")
    lines = [json.loads(line) for line in journal_lines(tmp_path / "all")]
    for line in lines:
        del line["check"]
    removed = next(line for line in lines[2:] if len(line.get("scores", {})) > len(line.get("kept", ())))
    gone = [int(writer) for writer in removed["scores"] if int(writer) not in removed["kept"]]
    removed |= {"estimated": gone[:1], "counts": {"gradients": 1}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=r"is damaged .*tests every edge"):
        discover(deep(), tmp_path / "out", tests="all", resume=True)


def test_a_finished_run_is_held_against_its_journal(verified: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(verified, tmp_path / "out"))
    circuit = Circuit.from_pretrained(folder)
    assert circuit.estimated is not None
    circuit.estimated[tuple(np.argwhere(circuit.estimated)[0])] = False
    circuit.save_pretrained(folder)
    with pytest.raises(RunError, match="is not the one its journal"):
        discover(deep(), folder, resume=True)


# -- the audit -------------------------------------------------------------------------------------------


def test_an_audit_finds_and_mends_what_slopes_that_lie_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All edges have the mean of their slopes, and nobody checks what they add up to."""
    told = SparseEngine.slopes

    def lying(self: Any, *arguments: Any) -> Slopes:
        found = told(self, *arguments)
        means = np.broadcast_to(found.effects.mean(axis=1, keepdims=True), found.effects.shape)
        return replace(found, effects=means, sizes=np.ones(len(found.writers)))

    every = discover(deep(), tests="all")
    monkeypatch.setattr(SparseEngine, "slopes", lying)
    trusting = IntervalRule(margin=-10.0, residual=1e9, bend=1e9)
    monkeypatch.setattr(intervals, "IntervalRule", lambda: trusting)
    blind = discover(deep(), audit=0.0)
    audited = discover(deep(), tmp_path / "out", audit=1.0)
    assert not np.array_equal(blind.kept, every.kept)
    assert np.array_equal(audited.kept, every.kept)
    facts = audited.record.estimates
    assert facts.wrong and facts.audited == facts.wrong + (facts.estimated or 0) and facts.at_most == 0
    assert facts.text is not None and facts.text.endswith("mended, and all were audited")
    assert run_main("show", str(tmp_path / "out")) == 0
    assert f"{facts.wrong} of {facts.audited} audited w" in capsys.readouterr().out
    again = deep().evaluate(audited, TASK, audit=10_000)["audit"]
    assert again["wrong"] == 0 and again["estimated"] == facts.estimated


# -- sweeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regime", "options"),
    [
        ("fp32", {}),
        ("pahq", {"screen": "eap-ig:0.6", "audit": 0.5}),
        exhaustive("pahq", {"absolute": True, "order": "head"}),
        exhaustive("rtn", {"engine": EngineConfig("hooks"), "readers": "logits,m*"}),
    ],
)
def test_a_sweeps_circuits_are_those_of_separate_runs(
    regime: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, taus = wrapped("llama", layers=4, regime=regime), [0.05, 0.3]
    options = {"tests": "verified", **options}
    found = model.sweep(TASK, thresholds=taus, out=tmp_path / "sweep", progress=False, **options)
    for tau, row in zip(taus, found.rows, strict=True):
        alone = discover(model, tmp_path / str(tau), **options, threshold=tau)
        assert_same_circuit(found[tau], alone)
        assert found[tau].discovery["estimates"] == alone.discovery["estimates"]
        for name in ("scores.safetensors", "journal.jsonl"):
            ours = tmp_path / "sweep" / f"tau-{tau}" / name
            assert ours.read_bytes() == (tmp_path / str(tau) / name).read_bytes()
        assert row.estimates == alone.record.estimates and row.evaluations > 0
    assert sum(row.reused for row in found.rows) > 0
    again = Sweep.from_pretrained(tmp_path / "sweep")
    assert [row.estimates for row in again.rows] == [row.estimates for row in found.rows]


def test_a_sweep_says_its_audits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "demo", "--task", "ioi", "--n", "2", "--thresholds", "0.1,0.3"]
    out = tmp_path / "out"
    assert run_main(*command, "--tests", "verified", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    for row in Sweep.from_pretrained(out).rows:
        assert row.estimates is not None and row.estimates.text is not None
        assert f"tau {row.threshold:g}: {row.estimates.text}" in shown
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert all(row["estimates"]["audited"] > 0 for row in rows)
    assert run_main(*command, "--out", str(out), "--resume") == 2  # a sweep of another kind


# -- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--audit", "0.1"], "an audit draws from estimated edges: it needs tests verified"),
        (["--tests", "all", "--audit", "0"], "an audit draws from estimated edges: it needs tests verified"),
        (["--tests", "verified", "--audit", "1.5"], "audit must be a share from 0 to 1; got 1.5"),
        (["--tests", "verified", "--audit", "nan"], "audit must be a share from 0 to 1; got nan"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["discover", "demo", "--task", "ioi", "--n", "2", "--out", str(tmp_path / "out")]
    assert run_main(*command, *options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pahq: ") and told in line
    assert not (tmp_path / "out").exists()


def test_without_an_audit_it_says_so(tmp_path: Path) -> None:
    circuit = discover(deep(), tmp_path / "out", audit=0.0)
    assert circuit.record.estimates.audited == 0 and circuit.record.estimates.at_most == 1.0
    assert circuit.record.estimates.text == "not audited"
    assert circuit.discovery["arguments"]["audit"] == 0.0
    with pytest.raises(RunError, match=r"audit is 0\.0 there, 0\.02 now"):
        discover(deep(), tmp_path / "out", resume=True)
