"""Docstring: the next `:param` of a Python function's reST docstring (Heimersheim & Janiak, 2023)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pahq_hf.tasks import words
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.generating import PromptText, check_corruption, generate, text_pair, word_pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "docstring"
CORRUPTIONS = ("random_random",)
_ARGUMENTS = 4
_WORDS = 7
TEMPLATE = (
    "def {FUNCTION}(self, {A}, {B}, {C}, {D}):\n"
    '    """{w[0]} {w[1]} {w[2]}\n'
    "\n"
    "    :param {a}: {w[3]} {w[4]}\n"
    "    :param {b}: {w[5]} {w[6]}\n"
    "    :param"
)


def _text(function: str, defined: Sequence[str], documented: Sequence[str], filler: Sequence[str]) -> str:
    a, b, c, d = defined
    first, second = documented
    return TEMPLATE.format(FUNCTION=function, A=a, B=b, C=c, D=d, a=first, b=second, w=filler)


def draw(rng: random.Random, arguments: Sequence[str]) -> PromptText:
    """Draw one prompt pair.

    Args:
        rng: Source of randomness.
        arguments: At least eighteen nouns, for names and for the text of the docstring.

    Returns:
        The pair.
    """
    function, *rest = rng.sample(arguments, 1 + 2 * _ARGUMENTS + 2 + _WORDS)
    defined, rest = rest[:_ARGUMENTS], rest[_ARGUMENTS:]
    others, rest = rest[:_ARGUMENTS], rest[_ARGUMENTS:]
    documented, filler = rest[:2], rest[2:]
    a, b, c, d = defined
    return PromptText(
        clean=_text(function, defined, (a, b), filler),
        corrupted=_text(function, others, documented, filler),
        answer=f" {c}",
        distractors=(f" {a}", f" {b}", f" {d}"),
    )


def make_docstring(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 50,
    seed: int = 0,
    corruption: str = "random_random",
    metric: str | None = None,
    padding_side: str = "right",
) -> Task:
    """Docstrings for one tokenizer.

    The distractors are the prompt's other arguments. `logit_diff` takes the mean of their logits, one linear
    function of the last stream as attribution and the sparse engine need it; the original takes their
    maximum, which is what `accuracy` compares the answer with.

    Args:
        tokenizer: The model's tokenizer; only nouns that are one token under it are used.
        n: Number of prompt pairs.
        seed: The same seed and tokenizer give the same task on every machine.
        corruption: `"random_random"`, the only one: other argument names in the definition, and yet others in
            the docstring.
        metric: Default metric of the task; the one that is usual of it if None.
        padding_side: `"right"` or `"left"`.

    Returns:
        The task.

    Raises:
        TaskError: If the corruption is unknown, or the tokenizer lacks Python's marks and line breaks or has
            too few single-token nouns.
    """
    check_corruption(NAME, corruption, CORRUPTIONS)
    needed = 1 + 2 * _ARGUMENTS + 2 + _WORDS
    arguments = word_pool(NAME, tokenizer, "nouns", words.ARGUMENTS, needed)

    return generate(
        NAME,
        tokenizer,
        lambda rng: text_pair(tokenizer, draw(rng, arguments)),
        n=n,
        seed=seed,
        corruption=corruption,
        metric=metric,
        padding_side=padding_side,
    )
