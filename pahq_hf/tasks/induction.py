"""Induction: random tokens said twice, each token of the second copy predicted from the first."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pahq_hf.errors import TaskError
from pahq_hf.tasks.base import Pair, Task, collate
from pahq_hf.tasks.generating import check_corruption
from pahq_hf.tasks.metrics import default_metric
from pahq_hf.tasks.tokenization import encode, encode_prompt, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "induction"
CORRUPTIONS = ("redrawn",)
LENGTH = 10
"""Tokens of one copy."""

# A word or a part of one, after the mark for a space that byte-level BPE, SentencePiece or neither writes.
_ORDINARY = re.compile(r"[Ġ▁ ]?[A-Za-z]+")


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are words or parts of words: no special, added, reserved or byte tokens.

    Args:
        tokenizer: The model's tokenizer.

    Returns:
        Their ids, ascending.
    """
    reserved = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return sorted(
        token
        for text, token in tokenizer.get_vocab().items()
        if token not in reserved and _ORDINARY.fullmatch(text)
    )


def draw(rng: random.Random, vocabulary: list[int], length: int = LENGTH) -> tuple[list[int], list[int]]:
    """Draw a sequence and what replaces its first copy.

    No token occurs twice in the two of them, so the token before fixes the one that follows, and the
    corrupted prompt holds no trace of the clean one's first copy.

    Args:
        rng: Source of randomness.
        vocabulary: At least `2 * length` token ids.
        length: Tokens of one copy.

    Returns:
        The sequence and the replacement. [length], [length]
    """
    tokens = rng.sample(vocabulary, 2 * length)
    return tokens[:length], tokens[length:]


def make_induction(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 50,
    seed: int = 0,
    corruption: str = "redrawn",
    metric: str | None = None,
    padding_side: str = "right",
) -> Task:
    """Induction on random tokens of one tokenizer (ACDC's task of the same name).

    Every token of the second copy but its first is scored: `LENGTH - 1` rows per example.

    Args:
        tokenizer: The model's tokenizer; its own special tokens (Llama's BOS) open every prompt.
        n: Number of prompt pairs.
        seed: The same seed and tokenizer give the same task on every machine.
        corruption: `"redrawn"`, the only one: the first copy is drawn anew.
        metric: Default metric of the task; the one that is usual of it if None.
        padding_side: `"right"` or `"left"`; the prompts have one length, so nothing is padded.

    Returns:
        The task; it has answers and no distractors.

    Raises:
        TaskError: If the corruption is unknown or the tokenizer has too few ordinary tokens.
    """
    import torch

    check_corruption(NAME, corruption, CORRUPTIONS)
    vocabulary = ordinary_tokens(tokenizer)
    if len(vocabulary) < 2 * LENGTH:
        raise TaskError(
            f"task {NAME!r} needs {2 * LENGTH} tokens that are words or parts of words in Latin letters, and "
            f"this tokenizer has {len(vocabulary)}"
        )
    opening = encode_prompt(tokenizer, "the")[: -len(encode(tokenizer, "the"))]
    rng = random.Random(seed)
    drawn = [draw(rng, vocabulary) for _ in range(n)]
    # The last token is only ever an answer: nothing after it is scored.
    pairs = [
        Pair([*opening, *copy, *copy[:-1]], [*opening, *other, *copy[:-1]], copy[-1:])
        for copy, other in drawn
    ]
    whole = collate(
        pairs,
        name=NAME,
        metric=metric or default_metric("induction"),
        pad_id=pad_id(tokenizer),
        padding_side=padding_side,
        source={"generator": NAME, "corruption": corruption, "length": LENGTH, "n": n, "seed": seed},
    )
    scored = torch.arange(LENGTH - 1) + len(opening) + LENGTH
    return replace(
        whole,
        answer_rows=torch.arange(n).repeat_interleave(LENGTH - 1),
        answer_positions=scored.repeat(n),
        answers=tuple((token,) for copy, _ in drawn for token in copy[1:]),
        distractors=((),) * (n * (LENGTH - 1)),
    )
