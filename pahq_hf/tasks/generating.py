"""What every generator does: draw a prompt pair, tokenise it, check it, draw again if it fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pahq_hf.errors import TaskError
from pahq_hf.tasks.base import Pair, Task, collate
from pahq_hf.tasks.metrics import default_metric
from pahq_hf.tasks.tokenization import continuation, encode_prompt, has_unknown, pad_id, single_token_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EARLY = 2_000  # draws, after which a task that a tokenizer does not suit is given up
_HOPELESS = 100  # draws for a pair


def check_corruption(name: str, corruption: str, known: Sequence[str]) -> None:
    """Check that a task has a corruption.

    Args:
        name: The task.
        corruption: What was asked for.
        known: What there is.

    Raises:
        TaskError: If it has not.
    """
    if corruption not in known:
        raise TaskError(f"task {name!r} has no corruption {corruption!r}; choose from {', '.join(known)}")


def word_pool(
    name: str, tokenizer: PreTrainedTokenizerBase, kind: str, candidates: Sequence[str], needed: int = 1
) -> tuple[str, ...]:
    """The candidates that are one token under a tokenizer.

    Args:
        name: The task.
        tokenizer: The model's tokenizer.
        kind: What the words are, for the message.
        candidates: The words.
        needed: How many the task needs at least.

    Returns:
        The usable words.

    Raises:
        TaskError: If they are fewer than needed.
    """
    usable = single_token_words(tokenizer, candidates)
    if len(usable) < needed:
        raise TaskError(
            f"task {name!r} needs {needed} {kind} that are one token, and this tokenizer has "
            f"{len(usable)} of {len(candidates)}"
        )
    return usable


@dataclass(frozen=True)
class PromptText:
    """One prompt pair as text.

    Attributes:
        clean: The prompt.
        corrupted: The corrupted prompt.
        answer: The right continuation, with its leading space.
        distractors: Wrong continuations, with theirs.
    """

    clean: str
    corrupted: str
    answer: str
    distractors: tuple[str, ...]


def text_pair(tokenizer: PreTrainedTokenizerBase, text: PromptText) -> Pair | str:
    """A prompt pair in tokens, checked.

    Args:
        tokenizer: The model's tokenizer.
        text: The pair as text.

    Returns:
        The pair, or why it cannot be used: the prompts' lengths differ, a word is unknown, or a
        continuation is not one token.
    """
    clean = text.clean
    ids, other = encode_prompt(tokenizer, clean), encode_prompt(tokenizer, text.corrupted)
    if len(ids) != len(other):
        return f"{clean!r} has {len(ids)} tokens and its corrupted prompt {len(other)}"
    if has_unknown(tokenizer, ids) or has_unknown(tokenizer, other):
        return f"{clean!r} has words the tokenizer does not know"
    found: list[tuple[int, ...]] = []
    for texts in ((text.answer,), text.distractors):
        tokens = [continuation(tokenizer, clean, each) for each in texts]
        whole = tuple(token for token in tokens if token is not None)
        if len(whole) < len(tokens):
            missing = texts[tokens.index(None)]
            return f"{missing!r} is not one token after {clean!r}"
        found.append(whole)
    right, wrong = found
    if set(right) & set(wrong):
        return f"an answer and a distractor are the same token after {clean!r}"
    return Pair(ids, other, right, wrong)


def draw_pairs(n: int, attempt: Callable[[], Pair | str]) -> tuple[list[Pair], str]:
    """Draw until `n` pairs pass.

    A failing pair is drawn again; when not even one in twenty passes the tokenizer does not suit the task,
    which shows long before the end if it is not one in a hundred.

    Args:
        n: How many pairs.
        attempt: Draws a pair, or says why what it drew cannot be used.

    Returns:
        At most `n` pairs, and why the last one that failed did.
    """
    pairs: list[Pair] = []
    failure = ""
    for number in range(20 * n + 100):
        if len(pairs) == n or (number >= _EARLY and _HOPELESS * len(pairs) < number):
            break
        outcome = attempt()
        if isinstance(outcome, Pair):
            pairs.append(outcome)
        else:
            failure = outcome
    return pairs, failure


def generate(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    attempt: Callable[[random.Random], Pair | str],
    *,
    n: int,
    seed: int,
    corruption: str,
    metric: str | None = None,
    padding_side: str,
) -> Task:
    """A task of `n` drawn pairs.

    Args:
        name: The task.
        tokenizer: The model's tokenizer.
        attempt: Draws a pair with the given randomness, or says why what it drew cannot be used.
        n: Number of prompt pairs.
        seed: The same seed and tokenizer give the same task on every machine.
        corruption: Kept with the task.
        metric: Default metric; the one that is usual of the task if None.
        padding_side: `"right"` or `"left"`.

    Returns:
        The task.

    Raises:
        TaskError: If too few pairs pass; the message says why the last one failed.
    """
    rng = random.Random(seed)
    pairs, failure = draw_pairs(n, lambda: attempt(rng))
    if len(pairs) < n:
        raise TaskError(
            f"task {name!r} could make only {len(pairs)} of {n} prompt pairs; the last failed as {failure}"
        )
    return collate(
        pairs,
        name=name,
        metric=metric or default_metric(name),
        pad_id=pad_id(tokenizer),
        padding_side=padding_side,
        source={"generator": name, "corruption": corruption, "n": n, "seed": seed},
    )
