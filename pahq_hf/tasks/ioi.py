"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary"."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pahq_hf.tasks import words
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.generating import PromptText, check_corruption, generate, text_pair, word_pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORRUPTIONS = ("abc", "s2_flip")

# {A} and {B} are the two first mentions, {S} the second mention of the subject: ABBA when it is {B}, BABA
# when it is {A}. All have 14 words and marks, so a task's prompts have one length under most tokenizers.
TEMPLATES: tuple[str, ...] = (
    "When {A} and {B} went to the {PLACE}, {S} gave a {OBJECT} to",
    "After {A} and {B} walked to the {PLACE}, {S} handed a {OBJECT} to",
    "While {A} and {B} were at the {PLACE}, {S} sent a {OBJECT} to",
    "Once {A} and {B} got to the {PLACE}, {S} offered a {OBJECT} to",
    "As {A} and {B} waited near the {PLACE}, {S} passed a {OBJECT} to",
    "Before {A} and {B} returned from the {PLACE}, {S} gave a {OBJECT} to",
    "Because {A} and {B} lived near the {PLACE}, {S} sold a {OBJECT} to",
    "The day {A} and {B} visited the {PLACE}, {S} showed a {OBJECT} to",
    "Then {A} and {B} met. At the {PLACE} {S} lent a {OBJECT} to",
    "Until {A} and {B} moved to the {PLACE}, {S} lent a {OBJECT} to",
    "Since {A} and {B} worked at the {PLACE}, {S} made a {OBJECT} for",
    "Both {A} and {B} liked the {PLACE}. There {S} threw a {OBJECT} to",
    "One day {A} and {B} visited the {PLACE}. {S} gave a {OBJECT} to",
)


def draw(
    rng: random.Random,
    names: tuple[str, ...],
    places: tuple[str, ...],
    objects: tuple[str, ...],
    corruption: str = "abc",
) -> PromptText:
    """Draw one prompt pair.

    Args:
        rng: Source of randomness.
        names: At least five names.
        places: At least one place.
        objects: At least one object.
        corruption: `"abc"` replaces the three mentions by three other names, `"s2_flip"` the subject's
            second mention by the indirect object.

    Returns:
        The pair.
    """
    template = rng.choice(TEMPLATES)
    subject, indirect, *others = rng.sample(names, 5)
    first, second = (subject, indirect) if rng.random() < 0.5 else (indirect, subject)
    scene = {"PLACE": rng.choice(places), "OBJECT": rng.choice(objects)}
    if corruption == "abc":
        a, b, s = others
    else:
        a, b, s = first, second, indirect
    return PromptText(
        clean=template.format(A=first, B=second, S=subject, **scene),
        corrupted=template.format(A=a, B=b, S=s, **scene),
        answer=f" {indirect}",
        distractors=(f" {subject}",),
    )


def make_ioi(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 50,
    seed: int = 0,
    corruption: str = "abc",
    metric: str | None = None,
    padding_side: str = "right",
) -> Task:
    """Indirect object identification for one tokenizer.

    Args:
        tokenizer: The model's tokenizer; only words that are one token under it are used.
        n: Number of prompt pairs.
        seed: The same seed and tokenizer give the same task on every machine.
        corruption: `"abc"` (three unrelated names) or `"s2_flip"` (the subject's second mention becomes
            the indirect object, as in MIB).
        metric: Default metric of the task; the one that is usual of it if None.
        padding_side: `"right"` or `"left"`.

    Returns:
        The task; each example's answer is the indirect object, its distractor the subject.

    Raises:
        TaskError: If the corruption is unknown or the tokenizer has too few single-token words.
    """
    check_corruption("ioi", corruption, CORRUPTIONS)
    names = word_pool("ioi", tokenizer, "names", words.NAMES, 5)
    places = word_pool("ioi", tokenizer, "places", words.PLACES)
    objects = word_pool("ioi", tokenizer, "objects", words.OBJECTS)

    return generate(
        "ioi",
        tokenizer,
        lambda rng: text_pair(tokenizer, draw(rng, names, places, objects, corruption)),
        n=n,
        seed=seed,
        corruption=corruption,
        metric=metric,
        padding_side=padding_side,
    )
