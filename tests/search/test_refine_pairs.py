"""Which prompt pairs `refine` learns from, is tested on, and is judged by."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import RunError
from pahq_hf.search import minibatches
from pahq_hf.search.journal import Chain
from pahq_hf.search.pairs import FEWEST, Split, learning_pairs, validation_pairs
from pahq_hf.tasks.base import Task
from tests.helpers import assert_same_circuit, interrupted_after, wrapped
from tests.models import random_task
from tests.tiers import examples, quick

WIDE = random_task(batch=12, length=7, padding="right", seed=11, metric="kl")
OPTIONS: dict[str, Any] = {
    "search": "refine",
    "edges": 9,
    "steps": 2,
    "minibatch": 3,
    "validation": 0.34,
    "progress": False,
}
DEMO: list[PAHQModel] = []


def demo() -> PAHQModel:
    """The demo model, loaded once."""
    if not DEMO:
        DEMO.append(PAHQModel.from_pretrained("demo", precision="fp32"))
    return DEMO[0]


def small(**options: Any) -> PAHQModel:
    return wrapped("gpt2", layers=1, **options)


def refined(model: PAHQModel, task: Task = WIDE, out: Path | None = None, **options: Any) -> Circuit:
    return model.discover(task, out=out, **(OPTIONS | options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "run"
    refined(small(), out=folder)
    return folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The journal, without its checksums."""
    found = [json.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]
    return [{name: value for name, value in line.items() if name != "check"} for line in found]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return lines_of(folder)[1:]


def circuits_of(folder: Path, start: BoolArray) -> list[BoolArray]:
    """The circuits of a run's rounds, from the last one backwards to its start."""
    found = [start]
    for step in steps_of(folder):
        if "removed" in step:
            kept = found[-1].copy()
            for edge in step["removed"]:
                kept[tuple(edge)] = False
            for edge in step.get("added", []):
                kept[tuple(edge)] = True
            found.append(kept)
    return found


def metric_on(model: PAHQModel, task: Task, kept: BoolArray, ablation: Any = "corrupted") -> float:
    setting = Setting(model.patched, task, "kl", ablation, model.pahq_config)
    return make_engine(setting, EngineConfig(engine="hooks")).metric_of(kept)


def test_the_nearest_circuit_on_pairs_that_no_step_saw_is_kept(finished: Path) -> None:
    """By brute force over all circuits that the search came through."""
    model, circuit = small(), Circuit.from_pretrained(finished)
    begin, *_ = steps_of(finished)
    judging = WIDE.select(begin["validation"])
    start = load_file(finished / "learned.safetensors")["start"].astype(bool)
    passed = circuits_of(finished, start)
    gaps = [metric_on(model, judging, kept) if kept.sum() <= 9 else np.inf for kept in passed]
    facts = circuit.discovery["refine"]
    assert len(passed) == facts["rounds"] + 1 and min(gaps) < gaps[-1]  # the last ones fit what they saw
    assert (circuit.kept == passed[int(np.argmin(gaps))]).all()
    assert facts["taken"] == int(np.argmin(gaps)) and facts["locally_minimal"] is False
    # What it says is so, on either kind of pairs, and on all of them together.
    others = WIDE.select([k for k in range(12) if k not in begin["validation"]])
    for name, task in (("searched", others), ("validation", judging)):
        assert facts[name]["examples"] == len(task)
        assert facts[name]["metric"] == pytest.approx(metric_on(model, task, circuit.kept), abs=1e-5)
        empty = metric_on(model, task, circuit.graph.no_edges())
        assert facts[name]["faithfulness"] == pytest.approx(1 - facts[name]["metric"] / empty, abs=1e-4)
    assert circuit.verified and circuit.record.task.examples == 12
    assert circuit.record.metric.final == pytest.approx(metric_on(model, WIDE, circuit.kept), abs=1e-5)


def test_it_ends_where_rounds_bring_nothing_on_pairs_that_judge(tmp_path: Path) -> None:
    whole, folder, model = tmp_path / "whole", tmp_path / "run", wrapped("llama", layers=1)
    refined(model, out=whole, edges=12, patience=0)
    circuit = refined(model, out=folder, edges=12, patience=1)
    begin, *ours = steps_of(folder)
    walked = [step for step in ours if "removed" in step and "back" not in step]
    every = [step for step in steps_of(whole) if "removed" in step and "back" not in step]
    assert walked == every[: len(walked)] and len(walked) < len(every)
    passed = circuits_of(folder, load_file(folder / "learned.safetensors")["start"].astype(bool))
    judged = [step["validation"] for step, kept in zip(walked, passed[1:], strict=False) if kept.sum() <= 12]
    gaps = [abs(value - begin["judged"]["full"]) for value in judged]
    assert len(gaps) > 1 and min(gaps) == gaps[-2] < gaps[-1]
    assert circuit.discovery["refine"]["locally_minimal"] is False
    assert_same_circuit(refined(model, out=folder, edges=12, patience=1, resume=True), circuit)


def test_what_judges_is_not_seen_by_any_step(finished: Path, tmp_path: Path) -> None:
    """With other prompts in the place of those that judge, the search comes through the same circuits."""
    numbers = steps_of(finished)[0]["validation"]
    changed = replace(WIDE, clean_ids=WIDE.clean_ids.clone(), corrupted_ids=WIDE.corrupted_ids.clone())
    other = random_task(batch=12, length=7, padding="right", seed=11, metric="kl")
    real = WIDE.attention_mask[numbers].bool()
    for name in ("clean_ids", "corrupted_ids"):
        ids = getattr(other, name)[numbers]
        getattr(changed, name)[numbers] = torch.where(real, ids % 7 + 1, ids)
    refined(small(), changed, tmp_path)
    ours, theirs = steps_of(tmp_path), steps_of(finished)
    assert ours[0]["validation"] == numbers and ours[0]["judged"] != theirs[0]["judged"]
    assert ours[0]["searched"] == theirs[0]["searched"]
    assert [step.get("removed") for step in ours] == [step.get("removed") for step in theirs]
    assert [step.get("metric") for step in ours] == [step.get("metric") for step in theirs]


def test_without_pairs_that_judge_the_last_circuit_is_kept_and_is_minimal(tmp_path: Path) -> None:
    circuit = refined(small(), out=tmp_path, validation=0.0)
    facts = circuit.discovery["refine"]
    assert facts["taken"] == facts["rounds"] and facts["locally_minimal"] is True
    assert "validation" not in facts and facts["searched"]["examples"] == 12
    assert steps_of(tmp_path)[0]["validation"] == [] and circuit.verified


def test_few_pairs_are_not_split_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    task = WIDE.select(range(10))
    facts = refined(small(), task).discovery["refine"]
    assert "validation" not in facts and facts["searched"]["examples"] == 10
    assert "of 10 prompt pairs none are kept back: a share of 0.34 is fewer than 4" in caplog.text
    caplog.clear()
    refined(small(), task, bootstrap=2, steps=0, edges=3)
    refined(small(), task, direction="both", steps=0, edges=3)
    assert caplog.text.count("none are kept back") == 2  # not for each resample, nor each direction
    caplog.clear()
    refined(small(), task, validation=0.0)
    assert "kept back" not in caplog.text


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_ablations_are_judged_too(ablation: Any) -> None:
    """Means of one part are others than those of the whole, by which the circuit is confirmed."""
    model = small()
    circuit = refined(model, ablation=ablation)
    assert circuit.verified and circuit.discovery["refine"]["validation"]["examples"] == 4
    final = metric_on(model, WIDE, circuit.kept, ablation)
    assert circuit.record.metric.final == pytest.approx(final, abs=1e-5)


@pytest.mark.parametrize("regime", quick(["pahq", "rtn", "pahq-literal"], "pahq"))
def test_it_is_judged_in_every_precision(regime: Any) -> None:
    circuit = refined(small(regime=regime))
    assert circuit.verified and circuit.discovery["refine"]["validation"]["examples"] == 4


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_an_interrupted_run_is_judged_as_another(finished: Path, tmp_path: Path, steps: int) -> None:
    with interrupted_after(steps):
        refined(small(), out=tmp_path)
    assert_same_circuit(refined(small(), out=tmp_path, resume=True), Circuit.from_pretrained(finished))
    for name in ("circuit.json", "scores.safetensors", "journal.jsonl", "learned.safetensors"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize(
    "change",
    [
        {"validation": [0, 99]},
        {"validation": [0, 0]},
        {"validation": list(range(12))},
        {"validation": [True]},
        {"validation": "1"},
        {"searched": {"full": 0.0}},
        {"judged": None},
        {"judged": {"full": 0, "empty": 1.0}},
    ],
)
def test_a_first_step_that_is_none_is_said_in_one_line(
    finished: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    header, begin, *others = lines_of(finished)
    chain = Chain()
    lines = [chain.seal(step) for step in (header, begin | change, *others)]
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(RunError, match="record 1 on line 2") as caught:
        refined(small(), out=tmp_path, resume=True)
    assert "\n" not in str(caught.value)


# -- the split ----------------------------------------------------------------------------------------------


def repeated(prompts: Sequence[int]) -> Task:
    """A task whose prompts are equal where the numbers are."""
    base = random_task(batch=max(prompts) + 1, seed=2)
    index = torch.tensor(list(prompts))
    return Task(
        "repeated",
        base.clean_ids[index],
        base.corrupted_ids[index],
        base.attention_mask[index],
        torch.arange(len(prompts)),
        base.answer_positions[index],
        tuple(base.answers[k] for k in prompts),
        tuple(base.distractors[k] for k in prompts),
    )


@examples(60)
@given(
    prompts=st.lists(st.integers(0, 15), min_size=1, max_size=60),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 5),
)
def test_equal_prompts_are_on_one_side(prompts: list[int], share: float, seed: int) -> None:
    task = repeated(prompts)
    numbers = validation_pairs(task, share, seed)
    assert numbers == validation_pairs(task, share, seed) == sorted(set(numbers))
    split = Split.of(task, numbers)
    if not numbers:
        assert split.validation is None and split.searched.fingerprint() == task.fingerprint()
        return
    assert split.validation is not None and len(split.searched) + len(split.validation) == len(task)
    assert not set(split.searched.prompts()) & set(split.validation.prompts())
    assert max(FEWEST, round(share * len(task))) <= len(numbers) <= len(task) / 2


def test_another_seed_draws_others() -> None:
    assert len({tuple(validation_pairs(WIDE, 0.5, seed)) for seed in range(5)}) > 1


def test_a_choice_of_examples_is_a_task_in_their_order() -> None:
    task = random_task(batch=6, length=7, padding="right", seed=3, rows=2)
    some = task.select([4, 1])
    assert some.prompts() == [task.prompts()[4], task.prompts()[1]]
    assert some.answer_rows.tolist() == [0, 0, 1, 1]
    rows = [[k for k, owner in enumerate(task.answer_rows.tolist()) if owner == e] for e in (4, 1)]
    assert list(some.answers) == [task.answers[k] for each in rows for k in each]
    assert some.select([1, 0]).fingerprint() == task.select([1, 4]).fingerprint()


# -- what is learned from -----------------------------------------------------------------------------------


def test_a_generated_task_is_learned_from_more_pairs_and_from_none_that_judge() -> None:
    task = load_task("gendered_pronoun", demo().tokenizer, n=40, metric="kl")
    split = Split.of(task, validation_pairs(task, 0.5, 0))
    own, drawn = learning_pairs(split, task, 400, 0)
    assert own is split.searched and len(own) + len(drawn) == 400
    assert split.validation is not None and not set(drawn.prompts()) & set(split.validation.prompts())
    assert learning_pairs(split, task, 400, 0)[1].fingerprint() == drawn.fingerprint()
    assert learning_pairs(split, task, 400, 1)[1].fingerprint() != drawn.fingerprint()
    # Nor are they those that somebody judges by afterwards, with the next seed.
    later = load_task("gendered_pronoun", demo().tokenizer, n=len(drawn), seed=1)
    assert later.fingerprint() != drawn.fingerprint()


def test_of_a_draw_that_is_short_it_takes_what_there_is() -> None:
    task = load_task("ioi", demo().tokenizer, n=12)
    assert task.more is not None
    same = task.drawn_by(lambda n, _: task.select([k % 12 for k in range(12)]))
    split = Split.of(same, validation_pairs(same, 0.34, 0))
    assert [len(each) for each in learning_pairs(split, same, 256, 0)] == [8, 8]


def test_data_are_not_extended_nor_is_what_was_made_of_a_task() -> None:
    task = load_task("ioi", demo().tokenizer, n=12)
    assert task.more is not None
    for other in (
        WIDE,
        replace(task, clean_ids=task.corrupted_ids),
        task.part(0, 12)[0],
        task.select([0, 1]),
    ):
        assert other.more is None
        assert len(learning_pairs(Split.of(other, ()), other, 256, 0)) == 1
    assert pickle.loads(pickle.dumps(task)).more is None


def test_a_run_says_how_many_pairs_it_learned_from(tmp_path: Path) -> None:
    task = load_task("ioi", demo().tokenizer, n=12, metric="kl")
    options: dict[str, Any] = {"edges": None, "max_gap": 0.8, "steps": 1, "minibatch": 16}
    assert refined(demo(), task, learn_pairs=64, **options).discovery["refine"]["learned_on"] == 64
    assert refined(demo(), task, learn_pairs=0, **options).discovery["refine"]["learned_on"] == 8
    assert refined(demo(), task, ablation="mean", **options).discovery["refine"]["learned_on"] == 8


def test_runs_that_do_not_fit_are_captured_again_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    first = refined(model)
    monkeypatch.setattr(minibatches, "free_memory", lambda device: 0)
    assert_same_circuit(refined(model), first)
