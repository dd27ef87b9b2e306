"""Metrics and accuracy against plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pahq_hf import Task
from pahq_hf.errors import MetricError
from pahq_hf.evaluation.greedy_accuracy import accuracy, chance
from pahq_hf.tasks.metrics import Metric, check_metric, known_metrics
from tests.tiers import examples

Sets = tuple[tuple[int, ...], ...]


def make_task(rows: list[int], answers: Sets, distractors: Sets) -> Task:
    """A task whose row i belongs to example `rows[i]`; its prompts do not matter here."""
    examples = max(rows) + 1
    ids = torch.zeros(examples, len(rows), dtype=torch.long)
    return Task(
        name="by hand",
        clean_ids=ids,
        corrupted_ids=ids,
        attention_mask=torch.ones_like(ids),
        answer_rows=torch.tensor(rows),
        answer_positions=torch.arange(len(rows)),
        answers=answers,
        distractors=distractors,
    )


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x) for x in logits]
    return [x / sum(powers) for x in powers]


LOGITS = [[2.0, 1.0, 0.0, -1.0], [0.5, 0.5, 3.0, 0.0], [-1.0, 4.0, 0.25, 0.0]]
REFERENCE = [[1.0, 1.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 3.0]]
P, Q = [softmax(row) for row in REFERENCE], [softmax(row) for row in LOGITS]
# Three examples of one row each: one, two, one answers; one, one, two distractors.
ANSWERS: Sets = ((0,), (1, 2), (3,))
DISTRACTORS: Sets = ((1,), (0,), (0, 2))
BY_HAND: dict[str, list[float]] = {
    "kl": [sum(p * math.log(p / q) for p, q in zip(P[i], Q[i], strict=True)) for i in range(3)],
    "logit_diff": [-(2 - 1), -((0.5 + 3) / 2 - 0.5), -(0 - (-1 + 0.25) / 2)],
    "nll": [-math.log(Q[0][0]), -math.log(Q[1][1] + Q[1][2]), -math.log(Q[2][3])],
    "prob_diff": [
        Q[0][1] - Q[0][0],
        Q[1][0] - Q[1][1] - Q[1][2],
        Q[2][0] + Q[2][2] - Q[2][3],
    ],
}
BY_HAND["match_nll"] = BY_HAND["nll"]


@pytest.mark.parametrize("name", known_metrics())
def test_values_by_hand(name: Any) -> None:
    task = make_task([0, 1, 2], ANSWERS, DISTRACTORS)
    metric = Metric(name, task, torch.tensor(REFERENCE))
    assert metric.rows(torch.tensor(LOGITS)).tolist() == pytest.approx(BY_HAND[name], abs=1e-12)
    assert metric(torch.tensor(LOGITS)) == pytest.approx(sum(BY_HAND[name]) / 3, abs=1e-12)


@pytest.mark.parametrize("name", known_metrics())
def test_rows_of_one_example_share_its_weight(name: Any) -> None:
    """Rows 0 and 2 are of the first example: they weigh a quarter each, row 1 a half."""
    metric = Metric(name, make_task([0, 1, 0], ANSWERS, DISTRACTORS), torch.tensor(REFERENCE))
    first, second, third = BY_HAND[name]
    assert metric(torch.tensor(LOGITS)) == pytest.approx((first + third) / 4 + second / 2, abs=1e-12)


def test_match_nll_scores_every_masked_position() -> None:
    """Four positions of one example: the mean of their negative log probabilities."""
    logits = torch.tensor([LOGITS[0], LOGITS[1], LOGITS[2], LOGITS[0]])
    metric = Metric("match_nll", make_task([0] * 4, ((1,), (2,), (1,), (3,)), ((),) * 4))
    wanted = [Q[0][1], Q[1][2], Q[2][1], Q[0][3]]
    assert metric(logits) == pytest.approx(-sum(math.log(p) for p in wanted) / 4, abs=1e-12)


def test_several_runs_at_once() -> None:
    """Leading axes are batches of runs. [runs, rows, vocab] -> [runs]"""
    task = make_task([0, 1, 2], ANSWERS, DISTRACTORS)
    runs = torch.randn(5, 3, 4)
    for name in known_metrics():
        metric = Metric(name, task, torch.tensor(REFERENCE))
        together = metric.reduce(metric.rows(runs)).tolist()
        assert together == pytest.approx([metric(run) for run in runs], abs=1e-12)


# -- KL -----------------------------------------------------------------------------------------------

KL_TASK = make_task([0, 1], ((), ()), ((), ()))


@examples(300)
@given(st.integers(0, 10_000), st.floats(0, 30), st.floats(-6, 2))
def test_kl_is_zero_for_the_full_model_and_never_negative(seed: int, scale: float, step: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(2, 50, generator=generator, dtype=torch.float64) * scale
    metric = Metric("kl", KL_TASK, reference)
    assert metric(reference) == 0.0
    assert metric(reference + 7) == pytest.approx(0, abs=1e-10)  # logits are defined up to a constant
    other = reference + torch.randn(2, 50, generator=generator, dtype=torch.float64) * 10**step
    assert metric(other) >= 0
    if step > -2 and scale < 3:  # one that is nearly certain of one token hardly notices
        assert metric(other) > 1e-9


def test_kl_takes_the_full_models_distribution_as_its_weight() -> None:
    """KL(full ‖ circuit), not the other way round."""
    full, circuit = torch.tensor([[5.0, 0.0]] * 2), torch.tensor([[0.0, 0.0]] * 2)
    p = 1 / (1 + math.exp(-5))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    reverse = -0.5 * math.log(2 * p) - 0.5 * math.log(2 * (1 - p))
    assert Metric("kl", KL_TASK, full)(circuit) == pytest.approx(expected, abs=1e-12)
    assert abs(expected - reverse) > 0.1


def test_kl_needs_a_reference() -> None:
    with pytest.raises(MetricError, match="reference"):
        Metric("kl", KL_TASK)


# -- what cannot be measured --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logit_diff", "nll", "prob_diff", "match_nll"])
def test_answers_are_needed_for_every_row(name: Any) -> None:
    for answers in (((), ()), ((1,), ())):
        with pytest.raises(MetricError, match=f"{name} needs an answer.*by hand.*use kl"):
            Metric(name, make_task([0, 1], answers, ((2,), (2,))))
    Metric(name, make_task([0, 1], ((1,), (1,)), ((2,), (2,))))


@pytest.mark.parametrize("name", ["logit_diff", "prob_diff"])
def test_distractors_are_needed_where_answers_are_compared(name: Any) -> None:
    task = make_task([0, 1], ((1,), (1,)), ((2,), ()))
    with pytest.raises(MetricError, match=f"{name} needs a distractor"):
        check_metric(name, task)
    for other in ("kl", "nll", "match_nll"):
        check_metric(other, task)


def test_unknown_metric() -> None:
    with pytest.raises(MetricError, match="unknown metric 'loss'; known: kl"):
        check_metric("loss", KL_TASK)


@pytest.mark.parametrize("name", known_metrics())
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_an_error(name: Any, bad: float) -> None:
    task = make_task([0, 1, 2], ANSWERS, DISTRACTORS)
    logits = torch.tensor(LOGITS)
    logits[1, 2] = bad
    with pytest.raises(MetricError, match=f"metric {name} came out as"):
        Metric(name, task, torch.tensor(REFERENCE))(logits)


def test_nan_in_the_reference_is_an_error() -> None:
    with pytest.raises(MetricError, match="came out as nan"):
        Metric("kl", KL_TASK, torch.full((2, 3), math.nan))(torch.zeros(2, 3))


def test_an_answer_far_out_of_reach_still_has_a_likelihood() -> None:
    """exp(-2000) is 0 in float64; its logarithm must not be taken that way."""
    logits = torch.tensor([[0.0, -2000.0, -2001.0]])
    one, both = (Metric("nll", make_task([0], (answers,), ((),))) for answers in ((1,), (1, 2)))
    assert one(logits) == pytest.approx(2000)
    assert both(logits) == pytest.approx(2000 - math.log(1 + math.exp(-1)))


# -- accuracy -----------------------------------------------------------------------------------------


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


def test_accuracy_asks_for_the_top_token_of_the_whole_vocabulary() -> None:
    """A distractor that is beaten does not make an answer that is not said right."""
    logits = rows([9.0, 2.0, 1.0, 0.0], [0.0, 9.0, 1.0, 2.0], [9.0, 1.0, 1.0, 0.0], [1.0, 0.0, 3.0, 2.0])
    task = make_task([0, 1, 2, 3], ((1,), (1,), (1,), (1, 2)), ((2,), (2, 3), (2,), (3,)))
    assert accuracy(logits, task, logits) == 0.5  # another token, the answer, another one, the second answer
    without = replace(task, distractors=((),) * 4)
    assert accuracy(logits, without, logits) == 0.5


def test_accuracy_without_answers_is_agreement_with_the_full_model() -> None:
    full = rows([0.0, 2.0, 1.0], [0.0, 1.0, 2.0])
    circuit = rows([0.0, 5.0, 1.0], [3.0, 1.0, 2.0])
    for task in (KL_TASK, replace(KL_TASK, answers=((1,), ()))):
        assert accuracy(circuit, task, full) == 0.5
        assert accuracy(full, task, full) == 1


def test_chance_is_the_accuracy_of_another_rows_answer() -> None:
    def of(*answers: tuple[int, ...]) -> float:
        return chance(make_task(list(range(len(answers))), answers, ((),) * len(answers)))

    assert of((1,), (1,), (2,), (2,)) == pytest.approx(1 / 3)  # of three others one has the same answer
    assert of((1,), (2,), (3,)) == 0
    assert of((1, 2), (2,)) == pytest.approx((1 + 1 / 2) / 2)
    assert of((1,), (1,)) == 0  # one answer everywhere says nothing of the prompt
    assert of((1,)) == of((), ()) == 0
