"""Gendered pronoun: "So Mary is a great friend, isn't" -> " she" (Mathwin et al., 2023)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pahq_hf.tasks import words
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.generating import PromptText, check_corruption, generate, text_pair, word_pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "gendered_pronoun"
CORRUPTIONS = ("other_gender",)
TEMPLATE = "So {NAME} is a {ADJECTIVE} {ROLE}, isn't"
PRONOUNS = (" he", " she")


@dataclass(frozen=True)
class Scene:
    """The words prompts are drawn from.

    Attributes:
        men: At least one man's name.
        women: At least one woman's name.
        adjectives: At least one adjective.
        roles: At least one role.
    """

    men: tuple[str, ...] = words.MEN
    women: tuple[str, ...] = words.WOMEN
    adjectives: tuple[str, ...] = words.ADJECTIVES
    roles: tuple[str, ...] = words.ROLES


def draw(rng: random.Random, scene: Scene) -> PromptText:
    """Draw one prompt pair; men and women are equally likely.

    Args:
        rng: Source of randomness.
        scene: The words to draw from.

    Returns:
        The pair.
    """
    names = [rng.choice(scene.men), rng.choice(scene.women)]
    gender = rng.randrange(2)
    rest = {"ADJECTIVE": rng.choice(scene.adjectives), "ROLE": rng.choice(scene.roles)}
    return PromptText(
        clean=TEMPLATE.format(NAME=names[gender], **rest),
        corrupted=TEMPLATE.format(NAME=names[1 - gender], **rest),
        answer=PRONOUNS[gender],
        distractors=(PRONOUNS[1 - gender],),
    )


def make_gendered_pronoun(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 50,
    seed: int = 0,
    corruption: str = "other_gender",
    metric: str | None = None,
    padding_side: str = "right",
) -> Task:
    """Gendered pronouns for one tokenizer.

    Args:
        tokenizer: The model's tokenizer; only words that are one token under it are used.
        n: Number of prompt pairs.
        seed: The same seed and tokenizer give the same task on every machine.
        corruption: `"other_gender"`, the only one: a name of the other gender.
        metric: Default metric of the task; the one that is usual of it if None.
        padding_side: `"right"` or `"left"`.

    Returns:
        The task; each example's answer is the pronoun of its name, its distractor the other one.

    Raises:
        TaskError: If the corruption is unknown or the tokenizer has too few single-token words.
    """
    check_corruption(NAME, corruption, CORRUPTIONS)
    scene = Scene(
        men=word_pool(NAME, tokenizer, "men's names", words.MEN),
        women=word_pool(NAME, tokenizer, "women's names", words.WOMEN),
        adjectives=word_pool(NAME, tokenizer, "adjectives", words.ADJECTIVES),
        roles=word_pool(NAME, tokenizer, "roles", words.ROLES),
    )

    return generate(
        NAME,
        tokenizer,
        lambda rng: text_pair(tokenizer, draw(rng, scene)),
        n=n,
        seed=seed,
        corruption=corruption,
        metric=metric,
        padding_side=padding_side,
    )
