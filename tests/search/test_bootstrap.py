"""Searches on resamples of a task's pairs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pahq_hf import BootstrapConfig, Circuit
from pahq_hf.errors import CircuitError, ConfigError, RunError
from pahq_hf.search.bootstrap import drawn, own_noise, resample
from pahq_hf.search.learning_options import LearningOptions
from pahq_hf.search.refine_options import RefineOptions
from pahq_hf.search.registry import searches
from tests.helpers import (
    assert_same_circuit,
    files_of,
    interrupted_after,
    journal_lines,
    named,
    run_main,
    wrapped,
)
from tests.models import random_task
from tests.tiers import exhaustive, quick

TASK = random_task(batch=5, length=7, padding="right", seed=11, rows=2, metric="logit_diff")
SAME = ("circuit.json", "scores.safetensors", "means.safetensors", "journal.jsonl")


def discover(out: Path | None = None, bootstrap: Any = 3, regime: Any = "fp32", **options: Any) -> Circuit:
    """ACDC with a bootstrap on a tiny model."""
    chosen: dict[str, Any] = {"threshold": 0.2, "progress": False}
    return wrapped("llama", regime=regime).discover(TASK, out=out, bootstrap=bootstrap, **(chosen | options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("bootstrap") / "run"
    discover(folder)
    return folder


def by_hand(number: int, seed: int = 0) -> Any:
    """A resample's pairs, put together one by one from tasks of one pair."""
    parts = [TASK.part(pair, pair + 1)[0] for pair in drawn(len(TASK), seed, number)]
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("clean_ids", "corrupted_ids", "attention_mask", "answer_positions")
    }
    owners = torch.cat([part.answer_rows + place for place, part in enumerate(parts)])
    answers = tuple(row for part in parts for row in part.answers)
    distractors = tuple(row for part in parts for row in part.distractors)
    return replace(TASK, answer_rows=owners, answers=answers, distractors=distractors, **joined)


# -- what is drawn ---------------------------------------------------------------------------------------


def test_pairs_are_drawn_with_replacement() -> None:
    draws = [drawn(40, 0, number) for number in range(1, 201)]
    assert all(len(each) == 40 and each == sorted(each) and set(each) <= set(range(40)) for each in draws)
    assert len({tuple(each) for each in draws}) == 200
    # A pair is left out of a resample with probability (1 - 1/40)^40 = .363.
    left_out = np.mean([40 - len(set(each)) for each in draws]) / 40
    assert left_out == pytest.approx(0.363, abs=0.02)
    assert drawn(40, 1, 1) != drawn(40, 0, 1) == draws[0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_resample_is_a_task_of_the_pairs_drawn(number: int) -> None:
    assert len(set(drawn(len(TASK), 0, number))) < len(TASK)  # one is there twice
    found = resample(TASK, 0, number)
    assert found.fingerprint() == by_hand(number).fingerprint() != TASK.fingerprint()
    assert found.source["pairs"] == drawn(len(TASK), 0, number)
    order = [3, 0, 3, 3]
    some = TASK.select(order)
    assert some.prompts() == [TASK.prompts()[place] for place in order]
    assert some.answer_rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert some.answers == tuple(TASK.answers[2 * place + row] for place in order for row in (0, 1))


# -- what comes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regime", "options"),
    [
        ("fp32", {}),
        ("pahq", {}),
        exhaustive("fp32", {"tests": "verified"}),
        exhaustive("fp32", {"ablation": "mean"}),
        exhaustive("fp32", {"direction": "both"}),
        ("fp32", {"search": "budget", "threshold": 0.1, "max_gap": 0.2}),
    ],
)
def test_it_is_the_same_search_on_each_resample(regime: Any, options: dict[str, Any]) -> None:
    ours = discover(regime=regime, **options)
    model, chosen = wrapped("llama", regime=regime), {"threshold": 0.2, **options}
    plain = model.discover(TASK, progress=False, **chosen)
    for name in ("kept", "scores", "tested"):
        assert np.array_equal(getattr(ours, name), getattr(plain, name))
    assert ours.record.metric == plain.record.metric and ours.verified and plain.frequencies is None
    kept = [model.discover(by_hand(n), progress=False, **chosen).kept for n in (1, 2, 3)]
    sets = [named(ours.graph, each) for each in kept]
    assert ours.frequencies is not None
    for r, reader in enumerate(ours.graph.readers):
        for w, writer in enumerate(ours.graph.writers):
            found = sum((writer.name, reader.name) in each for each in sets)
            assert ours.frequencies[r, w] == found / 3
    facts, all_pairs = ours.record.bootstrap, named(ours.graph, plain.kept)
    alike = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
    assert facts.between == pytest.approx(np.mean(alike), abs=1e-12) and np.mean(alike) < 1
    assert facts.with_circuit == pytest.approx(
        np.mean([len(all_pairs & b) / len(all_pairs | b) for b in sets])
    )
    assert facts.always == len(sets[0] & sets[1] & sets[2])
    assert facts.ever == len(sets[0] | sets[1] | sets[2])
    assert facts.consensus == sum(sum(e in each for each in sets) >= 2 for e in sets[0] | sets[1] | sets[2])


def test_refine_searches_resamples_too() -> None:
    """Equal prompts go to the same side of its split, and a generated task draws fresh pairs for each."""
    model = wrapped("gpt2", layers=1)
    task = random_task(batch=16, length=7, seed=5)
    options: dict[str, Any] = {"edges": 9, "steps": 1, "progress": False}
    ours = model.discover(task, bootstrap=2, **options)
    seeds = [own_noise(RefineOptions(edges=9), n).seed for n in (1, 2)]
    kept = [
        model.discover(resample(task, 0, n), seed=seed, **options).kept
        for n, seed in enumerate(seeds, start=1)
    ]
    assert np.array_equal(ours.frequencies, np.mean(kept, axis=0))  # type: ignore[arg-type]
    assert 0 < ours.edge_count <= 9
    drawing = task.drawn_by(lambda count, seed: random_task(batch=count, length=7, seed=seed % 2**31))
    assert resample(drawing, 0, 1).more is drawing.more


LEARNING = [name for name, kind in searches().items() if issubclass(kind.options, LearningOptions)]


@pytest.mark.parametrize("search", quick(LEARNING, "edge-pruning", "ugs"))
def test_each_resample_begins_with_noise_of_its_own(search: str, tmp_path: Path) -> None:
    """Which seed says, and an interrupted run goes on with it, to the same bytes."""
    model, task = wrapped("gpt2", layers=1), random_task(batch=4, length=6, seed=5, metric="kl")
    options: dict[str, Any] = {"search": search, "edges": 5, "steps": 2, "seed": 3, "progress": False}
    names = ("original", "resample-0001", "resample-0002")

    def seeds(folder: Path) -> list[int]:
        return [json.loads(journal_lines(folder / name)[0])[search]["seed"] for name in names]

    model.discover(task, out=tmp_path / "whole", bootstrap=2, **options)
    found = seeds(tmp_path / "whole")
    assert found[0] == 3 and len(set(found)) == 3
    kept = (tmp_path / "whole" / "original" / "journal.jsonl").read_bytes().count(b"\n") - 1
    with interrupted_after(kept + 2):  # in the first resample
        model.discover(task, out=tmp_path / "cut", bootstrap=2, **options)
    model.discover(task, out=tmp_path / "cut", bootstrap=2, resume=True, **options)
    assert seeds(tmp_path / "cut") == found
    before, after = files_of(tmp_path / "whole"), files_of(tmp_path / "cut")
    assert all(after[name] == before[name] for name in before if Path(name).name in SAME)


def test_the_consensus_is_a_circuit_beside_it(whole: Path) -> None:
    ours, consensus = (Circuit.from_pretrained(place) for place in (whole, whole / "consensus"))
    shares = ours.frequencies
    assert shares is not None
    assert np.array_equal(consensus.kept, shares >= 0.5) and consensus.edge_count > 0
    assert np.array_equal(consensus.scores, shares)
    report = wrapped("llama").evaluate(consensus, TASK)
    assert consensus.verified and consensus.verdict is not None
    assert report["faithfulness"] == pytest.approx(consensus.verdict.faithfulness, abs=1e-4)
    assert ours.record.bootstrap.faithfulness == consensus.verdict.faithfulness
    assert consensus.record.title.startswith("edges in at least 50 % of 3 resamples")
    with pytest.raises(CircuitError, match="found by 'consensus'"):
        wrapped("llama").evaluate(consensus, TASK, audit=3)
    strict = discover(bootstrap=BootstrapConfig(3, consensus=1.0))
    assert strict.record.bootstrap.consensus == int((shares == 1).sum()) < consensus.edge_count


# -- files -----------------------------------------------------------------------------------------------


def test_it_is_kept(whole: Path) -> None:
    ours = Circuit.from_pretrained(whole)
    assert_same_circuit(ours, discover())
    assert np.array_equal(ours.frequencies, discover().frequencies)  # type: ignore[arg-type]
    r, w = np.argwhere(ours.kept)[0]
    edge = json.loads((whole / "circuit.json").read_text())["edges"][ours.graph.edge_name(r, w)]
    assert edge["frequency"] == ours.frequencies[r, w]  # type: ignore[index]
    assert all(
        data["frequency"] in (0, 1 / 3, 2 / 3, 1) for _, _, data in ours.to_networkx().edges(data=True)
    )
    card = (whole / "README.md").read_text()
    assert "of 3 resamples" in card and "consensus" in card
    header = json.loads(journal_lines(whole / "resample-0002")[0])
    assert header["data"]["pairs"] == drawn(5, 0, 2) and header["data"]["resample"] == 2
    # The run of the task as it is, is to the byte the run without a bootstrap.
    plain = Circuit.from_pretrained(whole / "original")
    assert plain.frequencies is None and "frequency" not in (whole / "original" / "circuit.json").read_text()


def test_the_original_is_the_run_that_nobody_resampled(whole: Path, tmp_path: Path) -> None:
    wrapped("llama").discover(TASK, threshold=0.2, out=tmp_path / "plain", progress=False)
    for name in SAME:
        assert (whole / "original" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_frequencies_that_are_none_are_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    folder = tmp_path / "run"
    facts = json.loads((folder / "discovery.json").read_text())
    layout = '{"checksums": null}'
    for value in (1.5, -0.1, float("nan")):
        tensors = load_file(folder / "scores.safetensors")
        tensors["frequency"][0, 0] = value
        save_file(tensors, folder / "scores.safetensors", {"layout": layout})
        (folder / "discovery.json").write_text(json.dumps({**facts, "checksums": {}}))
        with pytest.raises(CircuitError, match="'frequency' has no shares"):
            Circuit.from_pretrained(folder)


# -- kill and resume -------------------------------------------------------------------------------------


def cut(whole: Path, folder: Path, *lines: int | None) -> Path:
    """A copy of the run that stopped after so many lines of its journals; None is all of a part."""
    names = ("original", "resample-0001", "resample-0002", "resample-0003")
    for name, count in zip(names, lines, strict=False):
        if count is None:
            shutil.copytree(whole / name, folder / name)
        else:
            (folder / name).mkdir(parents=True)
            kept = b"".join(journal_lines(whole / name)[:count])
            (folder / name / "journal.jsonl").write_bytes(kept + b'{"reader": ')
    return folder


@pytest.mark.parametrize(
    "lines",
    quick([(1,), (5,), (None,), (None, 4), (None, None, None, 2), (None,) * 4], (5,), (None, 4), (None,) * 4),
)
def test_it_goes_on_where_it_was_interrupted(
    whole: Path, tmp_path: Path, lines: tuple[int | None, ...]
) -> None:
    folder = cut(whole, tmp_path / "run", *lines)
    with pytest.raises(RunError, match="--resume"):
        discover(folder)
    ours = discover(folder, resume=True)
    assert_same_circuit(ours, Circuit.from_pretrained(whole))
    found, wanted = files_of(folder), files_of(whole)
    assert set(found) == set(wanted)
    assert all(found[name] == wanted[name] for name in wanted if Path(name).name in SAME)
    before = files_of(folder)
    assert_same_circuit(discover(folder, resume=True), ours)  # only read
    assert files_of(folder) == before
    with pytest.raises(RunError, match="holds a run already"):
        discover(folder)


def test_resamples_can_be_added(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = files_of(folder)
    more = discover(folder, 5, resume=True)
    assert np.array_equal(more.frequencies, discover(bootstrap=5).frequencies)  # type: ignore[arg-type]
    after = files_of(folder)
    assert all(after[name] == before[name] for name in before if name.startswith(("original", "resample")))
    assert Circuit.from_pretrained(folder).record.bootstrap.resamples == 5
    # Another share needs no search, and fewer resamples none either.
    again = discover(folder, BootstrapConfig(3, consensus=0.9), resume=True)
    assert np.array_equal(again.frequencies, Circuit.from_pretrained(whole).frequencies)  # type: ignore[arg-type]
    assert Circuit.from_pretrained(folder / "consensus").edge_count == again.record.bootstrap.consensus


def test_a_folder_is_of_one_kind_of_run(whole: Path, tmp_path: Path) -> None:
    half, model = cut(whole, tmp_path / "half", 5), wrapped("llama")
    for direction in ("noising", "both"):
        with pytest.raises(RunError, match="holds a search with a bootstrap"):
            model.discover(TASK, threshold=0.2, direction=direction, out=half, resume=True, progress=False)
    plain = tmp_path / "plain"
    (plain / "original").mkdir(parents=True)  # somebody's own, and no run
    model.discover(TASK, threshold=0.2, out=plain, progress=False)
    with pytest.raises(RunError, match="holds a search without a bootstrap"):
        discover(plain, resume=True)
    (plain / "circuit.json").unlink()
    with pytest.raises(RunError, match="holds a search without a bootstrap"):
        discover(plain, resume=True)
    for folder, options, message in (
        (whole, {"bootstrap": BootstrapConfig(3, seed=1)}, "its bootstrap seed is 0 there, 1 now"),
        (whole, {"threshold": 0.3}, r"its threshold is 0\.2 there"),
        (half, {"threshold": 0.3}, r"its threshold is 0\.2 there"),
        (cut(whole, tmp_path / "three", None, 3), {"bootstrap": BootstrapConfig(3, seed=1)}, "pairs"),
    ):
        with pytest.raises(RunError, match=message):
            discover(folder, resume=True, **options)
    # Without it a finished run is returned as it is.
    assert_same_circuit(discover(whole, None, resume=True), Circuit.from_pretrained(whole))


def test_what_was_changed_is_found(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    other = Circuit.from_pretrained(folder)
    assert other.frequencies is not None
    other.frequencies = np.where(other.kept, 1.0, other.frequencies)
    other.save_pretrained(folder)
    with pytest.raises(RunError, match="is not what its resamples found"):
        discover(folder, resume=True)


# -- what is refused, and the command line ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("bootstrap", "options", "message"),
    [
        (1, {}, "bootstrap is a number of resamples, each a whole search, from 2"),
        (-3, {}, "from 2 to 10,000; got -3"),
        (True, {}, "takes a number of resamples or a BootstrapConfig"),
        ("many", {}, "takes a number of resamples or a BootstrapConfig"),
        (2.5, {}, "takes a number of resamples or a BootstrapConfig"),
        (4, {"search": "eap", "threshold": None}, "a bootstrap takes a search that chooses its edges; eap"),
        (4, {"search": "refine", "curve": True, "threshold": None}, "curve keeps all"),
    ],
)
def test_what_means_nothing_is_refused(bootstrap: Any, options: dict[str, Any], message: str) -> None:
    chosen = {name: value for name, value in {"threshold": 0.2, **options}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        wrapped("llama").discover(TASK, bootstrap=bootstrap, progress=False, **chosen)


def test_further_refusals(tmp_path: Path) -> None:
    for values, message in (
        ({"consensus": 0.0}, "consensus is a share"),
        ({"consensus": 1.1}, "consensus is a share"),
        ({"consensus": float("nan")}, "consensus is a share"),
        ({"seed": 0.5}, "bootstrap seed must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            BootstrapConfig(3, **values)  # type: ignore[arg-type]
    model, one = wrapped("llama"), TASK.part(0, 1)[0]
    with pytest.raises(ConfigError, match="there is but one"):
        model.discover(one, threshold=0.2, bootstrap=2, out=tmp_path / "one", progress=False)
    assert not (tmp_path / "one").exists()
    with pytest.raises(ConfigError, match="discover alone takes it"):
        model.sweep(TASK, thresholds=[0.1, 0.2], bootstrap=3, progress=False)  # type: ignore[call-arg]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["demo", "--task", "sva", "--n", "3", "--precision", "fp32", "--readers", "logits,m3"]
    out = str(tmp_path / "run")
    asked = ["--threshold", "0.05", "--bootstrap", "2", "--consensus", "1", "--out", out]
    assert run_main("discover", *common, *asked) == 0
    said = capsys.readouterr()
    assert "--bootstrap 2 takes 3 searches, each as long as one without it" in said.err
    shown = " ".join(said.out.split())
    assert "stability Jaccard" in shown and "between two of 2 resamples" in shown and "consensus" in shown
    ours = Circuit.from_pretrained(out)
    assert ours.record.bootstrap.share == 1
    assert run_main("discover", *common, *asked, "--resume") == 0
    assert run_main("show", out) == 0
    shown = capsys.readouterr().out
    assert "in all resamples: faithfulness" in shown and "1 of the resamples" not in shown
    assert "edges in all 2 resamples: ACDC" in (tmp_path / "run" / "consensus" / "README.md").read_text()
    half = replace(ours.record.bootstrap, share=0.5)
    assert "in 50 % of the resamples or more: faithfulness" in half.texts["consensus"]
    assert run_main("show", f"{out}/consensus") == 0
    assert run_main("evaluate", f"{out}/consensus", "--model", "demo", "--task", "sva", "--n", "3") == 0
    capsys.readouterr()
    for options, message in (
        (["--bootstrap", "1"], "from 2 to 10,000"),
        (["--consensus", "0.5"], "give --bootstrap B too"),
        (["--bootstrap", "2", "--search", "refine", "--curve"], "curve keeps all"),
    ):
        plain = common if "refine" not in options else common[:-2]
        assert run_main("discover", *plain, *options, "--out", str(tmp_path / "bad")) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "bad").exists()
    sweep = ["--thresholds", "0.1,0.2", "--bootstrap", "2", "--out", str(tmp_path / "bad")]
    assert run_main("sweep", *common, *sweep) == 2
