"""Metrics of a circuit (docs/semantics.md, section 4). All are minimised; means over examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from pahq_hf.config import MetricName
from pahq_hf.divergence import divergence
from pahq_hf.errors import MetricError
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.columns import listed

_NEEDS_ANSWERS = ("logit_diff", "nll", "prob_diff", "match_nll")
_NEEDS_DISTRACTORS = ("logit_diff", "prob_diff")


@dataclass(frozen=True)
class TokenSets:
    """One set of tokens per row, padded.

    Attributes:
        ids: Token ids. [rows, width]
        mask: 1 where an id is real, 0 in the padding. [rows, width]
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, sets: Sequence[Sequence[int]], device: torch.device) -> TokenSets:
        """Pad sets of token ids."""
        width = max((len(tokens) for tokens in sets), default=0)
        ids = torch.zeros(len(sets), max(width, 1), dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.float64)
        for row, tokens in enumerate(sets):
            ids[row, : len(tokens)] = torch.tensor(list(tokens), dtype=torch.long)
            mask[row, : len(tokens)] = 1
        return cls(ids.to(device), mask.to(device))

    def gather(self, values: Tensor) -> Tensor:
        """Values of the set's tokens. [..., rows, vocab] -> [..., rows, width]"""
        index = self.ids.expand(*values.shape[:-1], self.ids.shape[-1])
        return values.gather(-1, index)

    def total(self, values: Tensor) -> Tensor:
        """Sum over each set. [..., rows, width] -> [..., rows]"""
        return (values * self.mask).sum(-1)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each set. [..., rows, width] -> [..., rows]"""
        return self.total(values) / self.mask.sum(-1)


class Metric:
    """A metric bound to a task and to the full model's answer.

    Args:
        name: One of the metrics of docs/semantics.md, section 4.
        task: Supplies rows, answers and distractors.
        reference: The full model's logits, needed by `kl`. [rows, vocab]
        device: Where logits will be.

    Raises:
        MetricError: If the task lacks the answers or distractors the metric needs.
    """

    def __init__(
        self,
        name: MetricName,
        task: Task,
        reference: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_metric(name, task)
        device = device or torch.device("cpu")
        self.name = name
        self.answers = TokenSets.of(task.answers, device)
        self.distractors = TokenSets.of(task.distractors, device)
        counts = torch.bincount(task.answer_rows, minlength=len(task)).to(torch.float64)
        # Rows of one example share its weight: the value is a mean over examples.
        self.row_weights = (1 / (counts[task.answer_rows] * len(task))).to(device)
        self._reference = reference if name == "kl" else None
        if name == "kl" and reference is None:
            raise MetricError("kl needs the full model's logits as its reference")

    @property
    def reference(self) -> Tensor:
        """The full model's logits, of `kl`. [rows, vocab]"""
        assert self._reference is not None
        return self._reference

    def reference_log_probs(self) -> Tensor:
        """The full model's log probabilities, of `kl`. [rows, vocab] in float64"""
        return self.reference.to(torch.float64).log_softmax(-1)

    def rows(self, logits: Tensor) -> Tensor:
        """The metric row by row. [..., rows, vocab] -> [..., rows] in float64

        Logits in float64 may be more than rounded ones: `kl` is as exact as they differ from the reference.
        """
        logits = logits.to(torch.float64)
        if self.name == "logit_diff":
            right = self.answers.mean(self.answers.gather(logits))
            return self.distractors.mean(self.distractors.gather(logits)) - right
        if self.name == "kl":
            return divergence(self.reference_log_probs(), logits - self.reference.to(torch.float64))
        log_probs = logits.log_softmax(-1)
        right = self.answers.gather(log_probs)
        if self.name == "prob_diff":
            wrong = self.distractors.gather(log_probs)
            return self.distractors.total(wrong.exp()) - self.answers.total(right.exp())
        # Not the log of a sum of probabilities: a hopeless answer's would be log 0.
        return -right.masked_fill(self.answers.mask == 0, -torch.inf).logsumexp(-1)

    def reduce(self, rows: Tensor) -> Tensor:
        """Mean over examples. [..., rows] -> [...]"""
        return (rows * self.row_weights).sum(-1)

    def __call__(self, logits: Tensor) -> float:
        """The metric of one run.

        Args:
            logits: Logits at the answer positions. [rows, vocab]

        Returns:
            The minimised value.

        Raises:
            MetricError: If it is NaN or infinite.
        """
        return checked(float(self.reduce(self.rows(logits))), self.name)


def checked(value: float, name: str) -> float:
    """`value`, unless it is NaN or infinite: no comparison with a threshold means anything then.

    Raises:
        MetricError: If it is.
    """
    if not math.isfinite(value):
        raise MetricError(
            f"metric {name} came out as {value}: the model's logits hold NaN or infinity on this data; "
            "check the checkpoint and the prompts"
        )
    return value


def check_metric(name: MetricName, task: Task) -> None:
    """Check that a task has what a metric needs.

    Raises:
        MetricError: If not.
    """
    if name not in get_args(MetricName):
        raise MetricError(f"unknown metric {name!r}; known: {', '.join(get_args(MetricName))}")
    if name in _NEEDS_ANSWERS and not task.has_answers:
        raise MetricError(
            f"metric {name} needs an answer for every example; {_lacks(task, task.answers)}: use kl"
        )
    if name in _NEEDS_DISTRACTORS and not task.has_distractors:
        raise MetricError(
            f"metric {name} needs a distractor for every example; {_lacks(task, task.distractors)}"
        )


def _lacks(task: Task, sets: Sequence[Sequence[int]]) -> str:
    """How many rows lack answers or distractors, and what columns their data has."""
    without = sum(not tokens for tokens in sets)
    count = "none" if without == len(sets) else f"none in {without} of {len(sets)} rows"
    columns = task.source.get("columns")
    seen = f" (its data has columns {listed(columns)})" if isinstance(columns, list) else ""
    return f"task {task.name!r} has {count}{seen}"
