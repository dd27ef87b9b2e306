"""Subject-verb agreement: "The keys to the cabinet" -> " are" (Linzen et al., 2016)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pahq_hf.tasks import words
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.generating import PromptText, check_corruption, generate, text_pair, word_pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "sva"
CORRUPTIONS = ("number_flip",)
TEMPLATE = "The {SUBJECT} {PREPOSITION} the {ATTRACTOR}"
PREPOSITIONS = ("to", "near", "behind", "from", "by", "under")
VERBS = (" is", " are")


def both_numbers(noun: str) -> tuple[str, str]:
    """Singular and plural of a noun of the word lists, which are all regular."""
    return noun, f"{noun}s"


def draw(rng: random.Random, subjects: tuple[str, ...], attractors: tuple[str, ...]) -> PromptText:
    """Draw one prompt pair.

    The attractor's number is drawn on its own: agreeing with the nearest noun is right only half the time.

    Args:
        rng: Source of randomness.
        subjects: At least one noun in the singular.
        attractors: At least one noun in the singular.

    Returns:
        The pair.
    """
    subject, attractor = rng.choice(subjects), rng.choice(attractors)
    number, other = rng.randrange(2), rng.randrange(2)
    rest = {"PREPOSITION": rng.choice(PREPOSITIONS), "ATTRACTOR": both_numbers(attractor)[other]}
    return PromptText(
        clean=TEMPLATE.format(SUBJECT=both_numbers(subject)[number], **rest),
        corrupted=TEMPLATE.format(SUBJECT=both_numbers(subject)[1 - number], **rest),
        answer=VERBS[number],
        distractors=(VERBS[1 - number],),
    )


def make_sva(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 50,
    seed: int = 0,
    corruption: str = "number_flip",
    metric: str | None = None,
    padding_side: str = "right",
) -> Task:
    """Subject-verb agreement across a prepositional phrase, for one tokenizer.

    Args:
        tokenizer: The model's tokenizer; only nouns that are one token in both numbers are used.
        n: Number of prompt pairs.
        seed: The same seed and tokenizer give the same task on every machine.
        corruption: `"number_flip"`, the only one: the subject changes its number.
        metric: Default metric of the task; the one that is usual of it if None.
        padding_side: `"right"` or `"left"`.

    Returns:
        The task; each example's answer is the verb that agrees, its distractor the one that does not.

    Raises:
        TaskError: If the corruption is unknown or the tokenizer has too few single-token nouns.
    """
    check_corruption(NAME, corruption, CORRUPTIONS)
    pools = []
    for kind, nouns in (("subjects", words.SUBJECTS), ("attractors", words.ATTRACTORS)):
        singular = word_pool(NAME, tokenizer, kind, nouns)
        plurals = set(word_pool(NAME, tokenizer, f"plural {kind}", [both_numbers(noun)[1] for noun in nouns]))
        whole = [noun for noun in singular if both_numbers(noun)[1] in plurals]
        pools.append(word_pool(NAME, tokenizer, f"{kind} in both numbers", whole))
    subjects, attractors = pools

    return generate(
        NAME,
        tokenizer,
        lambda rng: text_pair(tokenizer, draw(rng, subjects, attractors)),
        n=n,
        seed=seed,
        corruption=corruption,
        metric=metric,
        padding_side=padding_side,
    )
