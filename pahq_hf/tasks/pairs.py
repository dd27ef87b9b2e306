"""From what a row of data says to a pair: lengths made equal, and what of its answers is scored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pahq_hf.errors import TaskError
from pahq_hf.tasks.base import Pair
from pahq_hf.tasks.options import AnswerTokens

Answers = tuple[tuple[int, ...], ...]  # tokens of each


class LengthMismatch(TaskError):
    """The prompts of a pair have different numbers of tokens."""


@dataclass(frozen=True)
class Draft:
    """A row in tokens.

    Attributes:
        clean: Tokens of the clean prompt.
        corrupted: Tokens of the corrupted prompt.
        answers: Tokens of each right continuation.
        distractors: Tokens of each wrong one.
    """

    clean: Sequence[int]
    corrupted: Sequence[int]
    answers: Answers = ()
    distractors: Answers = ()


def aligned(draft: Draft, filler: int | None, at: str) -> Draft:
    """The same with prompts of one length.

    Args:
        draft: The row.
        filler: Token that a shorter corrupted prompt is filled with; None fills none.
        at: The row, for messages.

    Raises:
        LengthMismatch: If they differ and cannot be made equal.
        TaskError: If the clean prompt is empty.
    """
    clean, corrupted = list(draft.clean), list(draft.corrupted)
    if not clean:
        raise TaskError(f"{at}: the clean prompt has no tokens")
    if len(clean) == len(corrupted):
        return draft
    unequal = (
        f"{at}: the clean prompt has {len(clean)} tokens and the corrupted one {len(corrupted)}; "
        "activation patching needs equal lengths"
    )
    if filler is None:
        raise LengthMismatch(unequal)
    if len(corrupted) > len(clean):
        raise LengthMismatch(f"{unequal}, and only corrupted prompts are filled")
    begin, end = _shared(clean, corrupted)
    if end == 0 and begin == len(corrupted):
        raise LengthMismatch(f"{unequal}, and the corrupted prompt is where the clean one begins")
    filling = [filler] * (len(clean) - len(corrupted))
    return replace(draft, corrupted=[*corrupted[:begin], *filling, *corrupted[begin:]])


def _shared(one: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """How many tokens two prompts have in common where they begin, and where they end."""
    short = min(len(one), len(other))
    begin = 0
    while begin < short and one[begin] == other[begin]:
        begin += 1
    end = 0
    while end < short - begin and one[-1 - end] == other[-1 - end]:
        end += 1
    return begin, end


def scored(draft: Draft, tokens: AnswerTokens, at: str) -> Pair:
    """The pair, its answers as tokens of scored positions.

    Args:
        draft: The row, prompts of one length.
        tokens: What of the answers is scored.
        at: The row, for messages.

    Raises:
        TaskError: If its answers cannot be scored so.
    """
    answers, distractors = draft.answers, draft.distractors
    if tokens == "whole" and answers:
        return _whole(draft, at)
    prefix = _common(answers, distractors) if tokens == "first" else ()
    place = len(prefix)
    right, wrong = (_distinct(text[place] for text in texts) for texts in (answers, distractors))
    both = sorted(set(right) & set(wrong))
    if both:
        several = tokens == "first" and any(len(text) > 1 for text in (*answers, *distractors))
        kind = ", the first in which others differ," if several else ""
        raise TaskError(f"{at}: token {both[0]}{kind} is both an answer and a distractor")
    return Pair([*draft.clean, *prefix], [*draft.corrupted, *prefix], right, wrong)


def _whole(draft: Draft, at: str) -> Pair:
    if len(draft.answers) > 1:
        raise TaskError(
            f"{at}: whole answers are read one after the other, so a row has one; this one has "
            f"{len(draft.answers)}"
        )
    (answer,) = draft.answers
    read = answer[:-1]
    return Pair([*draft.clean, *read], [*draft.corrupted, *read], answer[-1:], (), scored=len(answer))


def _common(answers: Answers, distractors: Answers) -> tuple[int, ...]:
    """Tokens that all answers and distractors begin with, where there are both, but for the last of each."""
    if not answers or not distractors:
        return ()
    texts = [*answers, *distractors]
    begin = 0
    while all(len(text) > begin + 1 for text in texts) and len({text[begin] for text in texts}) == 1:
        begin += 1
    return texts[0][:begin]


def _distinct(tokens: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(tokens))
