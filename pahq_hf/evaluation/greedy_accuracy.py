"""Accuracy: what greedy decoding would say, right or wrong (docs/semantics.md, section 4)."""

from __future__ import annotations

import logging
from collections import defaultdict

from torch import Tensor

from pahq_hf.tasks.base import Task

logger = logging.getLogger(__name__)
_NEAR_CHANCE = 0.1  # of the way from chance to no mistake


def accuracy(logits: Tensor, task: Task, full: Tensor) -> float:
    """Top-1 accuracy: the share of scored rows whose most probable token is one of the right answers.

    The most probable token is looked for in the whole vocabulary. Without answers it is compared with the
    full model's, and the share is agreement.

    Args:
        logits: Logits at the answer positions. [rows, vocab]
        task: The task.
        full: The full model's logits there. [rows, vocab]

    Returns:
        The share, within 0 and 1.
    """
    top = logits.argmax(-1).tolist()
    right = task.answers if task.has_answers else [(token,) for token in full.argmax(-1).tolist()]
    return sum(token in answers for token, answers in zip(top, right, strict=True)) / len(top)


def chance(task: Task) -> float:
    """How often an answer drawn from the task's other rows is right: an accuracy that needs no prompt.

    Half for `she` or `he` in equal shares, next to nothing for names. 0 where the answers cannot tell: with
    one row, without answers, or when one answer is right everywhere.

    Args:
        task: The task.
    """
    rows = len(task.answers)
    if rows < 2 or not task.has_answers:
        return 0.0
    drawn: defaultdict[int, float] = defaultdict(float)  # how often a token is drawn, over all rows
    for answers in task.answers:
        for token in answers:
            drawn[token] += 1 / len(answers)
    # A row's own draw is always right, and is no other row's.
    hits = sum(sum(drawn[token] for token in set(answers)) - 1 for answers in task.answers)
    share = hits / (rows * (rows - 1))
    return share if share < 1 - 1e-9 else 0.0


def preference(logits: Tensor, task: Task) -> tuple[float, float]:
    """How often a right answer is likelier than every wrong one, and how often it would be by chance.

    Args:
        logits: Logits at the answer positions. [rows, vocab]
        task: The task; it has answers and distractors.
    """
    found, guessed = 0, 0.0
    for row, right, wrong in zip(logits, task.answers, task.distractors, strict=True):
        found += bool(row[list(right)].max() > row[list(wrong)].max())
        guessed += len(right) / (len(right) + len(wrong))
    return found / len(logits), guessed / len(logits)


def warn_near_chance(logits: Tensor, task: Task) -> None:
    """Log a warning when the full model does a task hardly better than chance.

    Args:
        logits: The full model's on the clean prompts. [rows, vocab]
        task: The task.
    """
    if not task.has_answers:
        return
    found, guessed = accuracy(logits, task, logits), chance(task)
    if found >= guessed + _NEAR_CHANCE * (1 - guessed):
        _warn_without_preference(logits, task)
    else:
        logger.warning(
            "the full model's accuracy on the clean prompts is %.2f, near chance (%.2f): it does not do this "
            "task, and a circuit of it means little",
            found,
            guessed,
        )


def _warn_without_preference(logits: Tensor, task: Task) -> None:
    """Log a warning when the full model hardly prefers right answers to wrong ones."""
    if not task.has_distractors:
        return
    found, guessed = preference(logits, task)
    if found < guessed + _NEAR_CHANCE * (1 - guessed):
        logger.warning(
            "the full model finds a right answer likelier than the distractors in %.2f of the rows, near "
            "chance (%.2f): a logit difference of this task means little",
            found,
            guessed,
        )
