"""Which prompt pairs a search learns from, is tested on, and is judged by.

A circuit that is chosen on the pairs it was fitted to looks better than it is. So some pairs of the
task are split off before the search begins: no step of it sees them, and what they say decides which of its
circuits is kept. Equal prompts go to the same side.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from pahq_hf.engine.setting import Setting
from pahq_hf.errors import TaskError
from pahq_hf.tasks.base import Task

logger = logging.getLogger(__name__)
FEWEST = 4  # pairs that judge: fewer say too little, and are missed where they are searched


@dataclass(frozen=True, eq=False)
class Split:
    """A task in two.

    Attributes:
        searched: The pairs that a search sees.
        validation: The pairs that judge it; None if there are none.
        numbers: Which of the task's pairs these are, rising.
    """

    searched: Task
    validation: Task | None
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, task: Task, numbers: Sequence[int]) -> Split:
        """Split a task.

        Args:
            task: The task.
            numbers: The pairs that judge, rising; none may be all.

        Raises:
            ValueError: If the task does not have them.
        """
        chosen = set(numbers)
        others = [number for number in range(len(task)) if number not in chosen]
        if list(numbers) != sorted(chosen) or not others or not chosen <= set(range(len(task))):
            raise ValueError("its validation pairs are none of the task's")
        if not chosen:
            return cls(task, None, ())
        return cls(task.select(others), task.select(numbers), tuple(numbers))


def validation_pairs(task: Task, share: float, seed: int) -> list[int]:
    """Draw the pairs that judge.

    Args:
        task: The task.
        share: Of its pairs, at most half.
        seed: The same seed draws the same.

    Returns:
        Their numbers, rising; none where they would be fewer than `FEWEST`.
    """
    wanted = round(share * len(task))
    if wanted < FEWEST:
        return []
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(task.prompts()):
        groups[prompt].append(number)
    order = list(groups.values())
    random.Random(f"validation {seed}").shuffle(order)
    found: list[int] = []
    for group in order:
        if len(found) + len(group) <= len(task) // 2:
            found += group
        if len(found) >= wanted:
            return sorted(found)
    return []  # nearly all prompts are the same


def warn_unsplit(split: Split, share: float, patience: int | None = None) -> None:
    """Say so where a share of the pairs was to judge, and none do.

    Args:
        split: The task in two.
        share: Of the pairs that were to judge.
        patience: What was asked for of rounds on them.
    """
    if share and split.validation is None:
        logger.warning(
            "of %d prompt %s none are kept back: a share of %g is fewer than %d, or they are all alike; "
            "the circuit is judged on those it is searched on%s; give it 64 pairs or more",
            len(split.searched),
            "pair" if len(split.searched) == 1 else "pairs",
            share,
            FEWEST,
            "" if patience is None else f", and patience {patience} ends nothing",
        )


def learned_from(split: Split, setting: Setting, count: int, seed: int) -> list[Task]:
    """The pairs that a search learns from.

    Args:
        split: The setting's task in two.
        setting: Where means stand in for edges, which pairs they are makes a difference: there are no others.
        count: How many are wanted in all.
        seed: The same seed draws the same.
    """
    if setting.has_means:
        return [split.searched]
    return learning_pairs(split, setting.task, count, seed)


def learning_pairs(split: Split, whole: Task, count: int, seed: int) -> list[Task]:
    """The pairs to learn from: those that are searched, and more of their kind where the task can draw some.

    Args:
        split: The task in two.
        whole: The task.
        count: How many are wanted in all.
        seed: The same seed draws the same.

    Returns:
        Tasks, the searched pairs first. No prompt is one of those that judge.
    """
    wanted = count - len(split.searched)
    if wanted <= 0 or whole.more is None:
        return [split.searched]
    shut = set() if split.validation is None else set(split.validation.prompts())
    # Of no seed that people give: what they judge by later is drawn from those.
    digest = blake2b(f"learning {whole.fingerprint()} {seed}".encode(), digest_size=8).digest()
    try:
        drawn = whole.more(wanted + max(16, wanted // 4), int.from_bytes(digest, "big"))
    except TaskError:  # it could make these and no more
        return [split.searched]
    new = _others(drawn, shut)[:wanted]
    return [split.searched, drawn.select(new)] if new else [split.searched]


def _others(task: Task, shut: Collection[tuple[int, ...]]) -> list[int]:
    """The pairs whose prompts are not among some."""
    return [number for number, prompt in enumerate(task.prompts()) if prompt not in shut]
