"""Searches by noising, denoising and both."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.circuit.render.asked import own_facts
from pahq_hf.circuit.render.facts import run_facts
from pahq_hf.circuit.render.page import circuit_page
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_referee
from pahq_hf.errors import CircuitError, ConfigError, RunError
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.attribution.options import AttributionConfig
from pahq_hf.search.kind import Found, SearchOptions
from pahq_hf.search.refine_options import RefineOptions
from pahq_hf.search.registry import _SEARCHES, register_search
from pahq_hf.search.work import Work
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import Metric
from tests.helpers import assert_same_circuit, files_of, journal_lines, named, referee, run_main, wrapped
from tests.models import random_task
from tests.tiers import exhaustive, quick

TASK = random_task(batch=2, length=7, padding="right", seed=11, metric="logit_diff")
TAU = {"kl": 0.1, "logit_diff": 0.2}


def discover(out: Path | None = None, name: str = "llama", regime: Any = "fp32", **options: Any) -> Circuit:
    """Run ACDC by denoising on a tiny model."""
    chosen: dict[str, Any] = {"threshold": TAU["logit_diff"], "direction": "denoising", "progress": False}
    return wrapped(name, regime=regime).discover(TASK, out=out, **(chosen | options))


# -- denoising -------------------------------------------------------------------------------------------


@cache
def theirs(name: str, metric: str) -> Any:
    """ACDC by the referee on prompts and answers that somebody swapped by hand."""
    swapped = Task(
        "by hand",
        TASK.corrupted_ids,
        TASK.clean_ids,
        TASK.attention_mask,
        TASK.answer_rows,
        TASK.answer_positions,
        TASK.distractors,
        TASK.answers,
        metric,
    )
    return referee(name, swapped, metric=metric).acdc(TAU[metric])


@pytest.mark.crossing
@pytest.mark.parametrize("kind", ["sparse", "hooks"])
@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize(
    "name", quick(["gpt2", "llama", "llama_split", "gpt_neox", "gemma2", "qwen3"], "llama", "qwen3")
)
def test_denoising_is_the_same_search_with_prompts_swapped(name: str, metric: str, kind: Any) -> None:
    expected = theirs(name, metric)
    ours = wrapped(name, dtype=torch.float64).discover(
        TASK,
        threshold=TAU[metric],
        metric=metric,
        direction="denoising",
        engine=EngineConfig(kind),
        progress=False,
    )
    assert named(ours.graph, ours.kept) == expected.kept
    assert 0 < ours.edge_count < ours.graph.edge_count
    for (writer, reader), score in expected.scores.items():
        r, w = ours.graph.reader_index(reader), ours.graph.writer_index(writer)
        assert ours.scores[r, w] == pytest.approx(score, abs=1e-7)
    swapped = ours.record.swapped
    assert swapped.final == pytest.approx(expected.final, abs=1e-7) and swapped.verified
    noising = wrapped(name).discover(TASK, threshold=TAU[metric], metric=metric, progress=False)
    assert not np.array_equal(noising.kept, ours.kept)


def test_what_denoising_finds_is_run_as_every_circuit() -> None:
    """Its own metric and verdict are those of clean prompts, with corrupted activations for removed edges."""
    ours, model = discover(), wrapped("llama")
    engine = make_referee(model.patched, TASK, "logit_diff", "corrupted")
    metric, swapped = ours.record.metric, ours.record.swapped
    assert ours.verified and metric.fp32 == pytest.approx(engine.metric_of(ours.kept), abs=1e-5)
    assert metric.full == pytest.approx(engine.metric_of(ours.graph.all_edges), abs=1e-5)
    # Swapped, the full model is the corrupted run, and no edges are the clean one; lower is worse.
    assert swapped.full == pytest.approx(-metric.empty, abs=1e-5)  # type: ignore[operator]
    assert swapped.empty == pytest.approx(-metric.full, abs=1e-5)  # type: ignore[operator]
    assert ours.record.arguments.direction == "denoising"
    report = model.evaluate(ours, TASK)
    assert report["metric"]["value"] == pytest.approx(metric.fp32, abs=1e-5)
    with pytest.raises(CircuitError, match="found by direction denoising"):
        model.evaluate(ours, TASK, audit=5)


@pytest.mark.parametrize("metric", ["logit_diff", "nll", "prob_diff", "match_nll", "kl"])
def test_a_metric_of_answers_turns_round(metric: str) -> None:
    """A distance from the model's answer does not; values row by row, and how far they may be off, agree."""
    logits = torch.randn(len(TASK.answers), 64, dtype=torch.float64)
    reference = torch.randn_like(logits)
    one, other = (Metric(metric, task, reference) for task in (TASK, TASK.swap()))
    sign = 1 if metric == "kl" else -1
    assert other(logits) == sign * one(logits) != 0
    assert other.rounding(logits, other(logits), 1e-6) == one.rounding(logits, one(logits), 1e-6)
    again = TASK.swap().swap()
    assert again.fingerprint() == TASK.fingerprint() != TASK.swap().fingerprint()
    assert TASK.swap().part(0, 1)[0].swapped and not again.swapped


def test_more_pairs_of_a_swapped_task_are_swapped() -> None:
    """And the same pairs go to the same side, whichever prompts come first."""
    task = load_task("sva", PAHQModel.from_pretrained("demo", precision="fp32").tokenizer, n=4)
    swapped = task.swap()
    assert task.more is not None and swapped.more is not None
    plain, more = task.more(3, 7), swapped.more(3, 7)
    assert more.swapped and torch.equal(more.clean_ids, plain.corrupted_ids)
    assert more.prompts() == plain.prompts() and swapped.prompts() == task.prompts()


SEARCHES: dict[str, dict[str, Any]] = {
    "budget": {"search": "budget", "max_gap": 0.2, "threshold": 0.5},
    "gap": {"criterion": "gap"},
    "screen": {"screen": "eap-ig:0.5"},
    "verified": {"tests": "verified", "readers": "logits,m*"},
    "refine": {"search": "refine", "edges": 12, "steps": 1, "threshold": None},
    "ugs": {"search": "ugs", "edges": 12, "steps": 2, "samples": 2, "threshold": None},
    "exact": {"search": "exact", "topn": 15, "threshold": None},
    "eap": {"search": "eap", "topn": 15, "threshold": None},
}


def options_of(name: str) -> dict[str, Any]:
    options = {"threshold": TAU["logit_diff"], **SEARCHES[name]}
    return {key: value for key, value in options.items() if value is not None}


def _sure(circuit: Circuit) -> dict[str, Any]:
    found = circuit.record.estimates
    return {"tested by": found.shares, "decisions like ACDC's": found.text} if found.text else {}


@pytest.mark.parametrize("name", quick(SEARCHES, "budget", "refine", "verified", "eap"))
def test_every_search_takes_a_direction(name: str, tmp_path: Path) -> None:
    model, options = wrapped("llama", layers=1 if name == "refine" else 2), options_of(name)
    quiet: dict[str, Any] = {"progress": False}
    one, other = (model.discover(TASK, direction=d, **quiet, **options) for d in ("noising", "denoising"))
    both = model.discover(TASK, direction="both", out=tmp_path / "run", **quiet, **options)
    assert not np.array_equal(one.kept, other.kept)
    assert np.array_equal(both.kept, one.kept | other.kept)
    assert both.verified is one.verified and other.verified is one.verified
    swapped = model.discover(TASK.swap(), **quiet, **options)  # by hand
    assert np.array_equal(swapped.kept, other.kept) and np.array_equal(swapped.scores, other.scores)
    assert other.record.swapped.final == swapped.record.metric.final
    assert_same_circuit(Circuit.from_pretrained(tmp_path / "run" / "noising"), one)
    assert_same_circuit(Circuit.from_pretrained(tmp_path / "run" / "denoising"), other)
    for direction, single in (("noising", one), ("denoising", other)):
        said = own_facts(single.record) | _sure(single)
        alone = {f"{direction}: {fact}": value for fact, value in said.items() if value is not None}
        assert alone.items() <= run_facts(both).items()
        assert all(f"| {fact} | " in (tmp_path / "run" / "README.md").read_text() for fact in alone)
        assert bool(alone) is (name in ("budget", "verified", "refine", "ugs"))
    if name == "budget":
        budget, facts = other.discovery["budget"], other.record.swapped
        assert facts.final_recomputed is not None
        assert abs(facts.final_recomputed - budget["full"]) <= budget["bound"] + 1e-5


@pytest.mark.crossing
@pytest.mark.parametrize("kind", ["sparse", "hooks"])
@pytest.mark.parametrize("regime", ["pahq", "rtn", "pahq-literal"])
def test_in_low_precision(regime: Any, kind: Any) -> None:
    ours = discover(regime=regime, direction="both", engine=EngineConfig(kind))
    by_hand = wrapped("llama", regime=regime).discover(
        TASK.swap(), threshold=TAU["logit_diff"], engine=EngineConfig(kind), progress=False
    )
    assert ours.verified and ours.record.swapped.verified
    found = ours.found_by
    assert found is not None and np.array_equal((found & 2) > 0, by_hand.kept)
    if regime == "pahq":
        exact = discover(direction="both")
        assert np.array_equal(ours.kept, exact.kept) and ours.gates == exact.gates


# -- both ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in both directions; nothing may change it."""
    folder = tmp_path_factory.mktemp("both") / "run"
    discover(folder, direction="both")
    return folder


def test_edges_are_labelled_by_who_found_them(whole: Path) -> None:
    ours = Circuit.from_pretrained(whole)
    noising, denoising = discover(direction="noising"), discover()
    assert np.array_equal(ours.kept, noising.kept | denoising.kept)
    gates = {name: "AND" for name, _ in noising.edges}
    gates |= {name: "ADDER" if name in gates else "OR" for name, _ in denoising.edges}
    assert ours.gates == gates and set(gates.values()) == {"AND", "OR", "ADDER"}
    for (r, w), single in ((e, [noising, denoising]) for e in zip(*np.nonzero(ours.kept), strict=True)):
        assert ours.scores[r, w] == max(c.scores[r, w] for c in single if c.kept[r, w])
    assert np.array_equal(ours.tested, noising.tested | denoising.tested)
    assert noising.gates == {} and noising.found_by is None


def test_files_tell_it(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = Circuit.from_pretrained(whole)
    counts = [list(ours.gates.values()).count(gate) for gate in ("AND", "OR", "ADDER")]
    document = json.loads((whole / "circuit.json").read_text())
    assert {name: facts["gate"] for name, facts in document["edges"].items()} == ours.gates
    facts = json.loads((whole / "discovery.json").read_text())
    assert facts["arguments"]["direction"] == "both"
    for name in ("noising", "denoising"):
        part = json.loads((whole / name / "discovery.json").read_text())
        assert facts["directions"][name]["metric"] == part["metric"]
        assert facts["directions"][name]["edges"] == part["edges"]["kept"]
    assert facts["evaluations"] == sum(
        json.loads((whole / name / "discovery.json").read_text())["evaluations"]
        for name in ("noising", "denoising")
    )
    assert facts["seconds"]["search"] > 0
    text = f"noising alone {counts[0]} (AND), denoising alone {counts[1]} (OR), both {counts[2]} (ADDER)"
    assert text in (whole / "README.md").read_text()
    assert run_main("show", str(whole)) == 0
    assert text in " ".join(capsys.readouterr().out.split())
    assert {data["gate"] for _, _, data in ours.to_networkx().edges(data=True)} == {"AND", "OR", "ADDER"}
    page = circuit_page(ours)
    told = re.search(r'"gates": ?\[\[(.*?)\]\]', page)
    assert told is not None and told[1].count("OR") == counts[1]
    single = Circuit.from_pretrained(whole / "noising")
    assert "gate" not in (whole / "noising" / "circuit.json").read_text()
    assert all("gate" not in data for _, _, data in single.to_networkx().edges(data=True))


def test_the_parts_are_runs_of_one_direction(whole: Path, tmp_path: Path) -> None:
    """That by noising is to the byte the run that nobody gave a direction."""
    wrapped("llama").discover(TASK, threshold=TAU["logit_diff"], out=tmp_path / "plain", progress=False)
    assert journal_lines(whole / "noising") == journal_lines(tmp_path / "plain")
    for name in ("circuit.json", "scores.safetensors", "means.safetensors"):
        assert (whole / "noising" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert b"direction" not in journal_lines(tmp_path / "plain")[0]
    assert b'"direction": "denoising"' in journal_lines(whole / "denoising")[0]


def cut(whole: Path, folder: Path, noising: int | None, denoising: int | None) -> Path:
    """A copy of the run that stopped after so many lines of its journals; None is all of a part."""
    for name, lines in (("noising", noising), ("denoising", denoising)):
        if lines is None:
            shutil.copytree(whole / name, folder / name)
        elif lines:
            (folder / name).mkdir(parents=True)
            rest = b'{"reader": '
            journal = folder / name / "journal.jsonl"
            journal.write_bytes(b"".join(journal_lines(whole / name)[:lines]) + rest)
    return folder


@pytest.mark.parametrize(("noising", "denoising"), [(1, 0), (5, 0), (None, 0), (None, 4), (None, None)])
def test_it_goes_on_where_it_was_interrupted(
    whole: Path, tmp_path: Path, noising: int | None, denoising: int | None
) -> None:
    folder = cut(whole, tmp_path / "run", noising, denoising)
    with pytest.raises(RunError, match="--resume"):
        discover(folder, direction="both")
    ours = discover(folder, direction="both", resume=True)
    assert_same_circuit(ours, Circuit.from_pretrained(whole))
    for place in (".", "noising", "denoising"):
        for name in ("circuit.json", "scores.safetensors", "means.safetensors", "journal.jsonl"):
            found, wanted = files_of(folder / place).get(name), files_of(whole / place).get(name)
            assert found == wanted and (place == "." or found is not None)
    before = files_of(folder)
    assert_same_circuit(discover(folder, direction="both", resume=True), ours)  # only read
    assert files_of(folder) == before


def test_a_folder_is_of_one_kind_of_run(whole: Path, tmp_path: Path) -> None:
    half = cut(whole, tmp_path / "half", 5, 0)
    for direction in ("noising", "denoising"):
        with pytest.raises(RunError, match="holds a search in both directions"):
            discover(half, direction=direction, resume=True)
    single = tmp_path / "single"
    discover(single)
    (single / "circuit.json").unlink()
    with pytest.raises(RunError, match="holds a search in one direction"):
        discover(single, direction="both", resume=True)
    with pytest.raises(RunError, match="its direction is denoising there"):
        discover(single, direction="noising", resume=True)
    with pytest.raises(RunError, match=r"its threshold is 0\.2 there"):
        discover(half, direction="both", threshold=0.3, resume=True)


def test_what_was_changed_is_found(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    other = Circuit.from_pretrained(folder)
    other.kept = other.kept.copy()
    other.kept[tuple(np.argwhere(other.kept)[0])] = False
    other.found_by = np.where(other.kept, other.found_by, 0).astype(np.uint8)
    other.save_pretrained(folder)
    with pytest.raises(RunError, match="is not what its directions found"):
        discover(folder, direction="both", resume=True)
    tensors = load_file(folder / "scores.safetensors")
    tensors["found_by"][other.kept] = 7
    save_file(tensors, folder / "scores.safetensors")
    facts = json.loads((folder / "discovery.json").read_text())
    del facts["checksums"]
    (folder / "discovery.json").write_text(json.dumps(facts))
    with pytest.raises(CircuitError, match="'found_by' does not tell who found which kept edges"):
        Circuit.from_pretrained(folder)


def test_a_part_that_is_not_confirmed_is_told(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    facts = json.loads((folder / "discovery.json").read_text())
    assert Circuit.from_pretrained(folder).verified
    facts["directions"]["denoising"]["swapped"]["final"] += 1
    (folder / "discovery.json").write_text(json.dumps(facts))
    circuit = Circuit.from_pretrained(folder)
    assert circuit.verified is False and circuit.record.doubt is not None


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ACDCConfig(direction="back"),
            "direction must be one of noising, denoising, both; got 'back'",
        ),  # type: ignore[arg-type]
        (lambda: ACDCConfig(direction="both", ablation="zero"), "needs ablation corrupted; got zero"),
        (lambda: RefineOptions(direction="denoising", ablation="mean"), "needs ablation corrupted; got mean"),
        (lambda: AttributionConfig(method="random", direction="both"), "means nothing for method random"),
        exhaustive(lambda: AttributionConfig(direction="both", ablation="mean"), "needs ablation corrupted"),
    ],
)
def test_what_means_nothing_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_sweep_has_one_direction(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = wrapped("llama")
    with pytest.raises(ConfigError, match="a sweep is by noising"):
        model.sweep(TASK, thresholds=[0.1, 0.2], config=ACDCConfig(direction="both"), progress=False)
    common = ["demo", "--task", "sva", "--n", "2", "--thresholds", "0.1,0.2", "--out", str(tmp_path / "s")]
    assert run_main("sweep", *common, "--direction", "both") == 2
    assert "No such option" in capsys.readouterr().err


def test_a_search_of_ones_own_may_mean_something_else_by_it() -> None:
    @dataclass(frozen=True)
    class Pointing(SearchOptions):
        direction: str = "both"

    @register_search("pointing", Pointing, command_line=False)
    def pointing(work: Work[Pointing]) -> Found:
        edges = work.graph.all_edges
        return Found(edges.copy(), np.ones(edges.shape), edges.copy())

    try:
        ours = wrapped("llama").discover(TASK, search="pointing", progress=False)
    finally:
        del _SEARCHES["pointing"]
    assert ours.found_by is None and ours.edge_count == ours.graph.edge_count


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["demo", "--task", "sva", "--n", "2", "--precision", "fp32"]
    out = str(tmp_path / "run")
    readers = ["--readers", "logits,m3", "--threshold", "0.05"]
    assert run_main("discover", *common, *readers, "--direction", "both", "--out", out) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "direction both" in shown and "found by noising alone" in shown
    assert run_main("discover", *common, *readers, "--direction", "both", "--out", out, "--resume") == 0
    ours = Circuit.from_pretrained(out)
    assert set(ours.gates.values()) <= {"AND", "OR", "ADDER"}
    # Edges of readers outside the search stay whatever they are: nobody found them.
    assert len(ours.gates) == int((ours.kept & ours.tested).sum()) < ours.edge_count
    best = ["--topn", "9", "--direction", "denoising", "--out", str(tmp_path / "best")]
    assert run_main("attribute", *common, "--method", "eap", *best) == 0
    assert Circuit.from_pretrained(tmp_path / "best").record.arguments.direction == "denoising"
    capsys.readouterr()
    bad = ["--direction", "both", "--ablation", "zero", "--out", str(tmp_path / "bad")]
    assert run_main("discover", *common, *bad) == 2
    assert "needs ablation corrupted" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
