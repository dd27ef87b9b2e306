"""Whether a model says the answers of a task as they are written: with a leading space, or without."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from pahq_hf.tasks.base import Spelling, Task

logger = logging.getLogger(__name__)


def warn_of_spelling(logits: Tensor, task: Task) -> None:
    """Log a warning when the full model finds answers likelier with a space that they lack, or without.

    Args:
        logits: The full model's on the clean prompts. [rows, vocab]
        task: The task.
    """
    if not task.spellings:
        return
    as_written = otherwise = 0.0
    rows = likelier = 0
    example: Spelling | None = None
    for row, answers in zip(logits, task.answers, strict=True):
        others = _others(answers, task)
        if not others:
            continue
        p = row.double().softmax(-1)
        own, other = float(p[list(answers)].sum()), float(p[[spelling.token for spelling in others]].sum())
        rows, as_written, otherwise = rows + 1, as_written + own, otherwise + other
        if other > own:
            likelier, example = likelier + 1, example or others[0]
    if example is None or 2 * likelier <= rows or otherwise <= as_written:
        return
    logger.warning(
        "the full model finds answers likelier %s a leading space, such as %r: its probability of them is "
        "%.2g on average, and %.2g as the data has them",
        "with" if example.text.startswith(" ") else "without",
        example.text,
        otherwise / rows,
        as_written / rows,
    )


def _others(answers: Sequence[int], task: Task) -> list[Spelling]:
    """The other spellings of some answers, where they are none of the answers themselves."""
    found = [task.spellings[token] for token in answers if token in task.spellings]
    return [spelling for spelling in found if spelling.token not in answers]
