"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary"."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pahq_hf.config import MetricName
from pahq_hf.errors import TaskError
from pahq_hf.tasks import words
from pahq_hf.tasks.base import Pair, Task, collate
from pahq_hf.tasks.tokens import continuation, encode_prompt, has_unknown, pad_id, single_token_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORRUPTIONS = ("abc", "s2_flip")

# {A} and {B} are the two first mentions, {S} the second mention of the subject: ABBA when it is {B}, BABA
# when it is {A}. All have 14 words and
# marks, so a task's prompts have one length under most tokenizers.
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


@dataclass(frozen=True)
class IOIText:
    """One prompt pair as text.

    Attributes:
        clean: The prompt.
        corrupted: The same prompt with other names.
        answer: The indirect object, with its leading space.
        distractor: The subject, with its leading space.
    """

    clean: str
    corrupted: str
    answer: str
    distractor: str


def draw(
    rng: random.Random,
    names: tuple[str, ...],
    places: tuple[str, ...],
    objects: tuple[str, ...],
    corruption: str = "abc",
) -> IOIText:
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
    return IOIText(
        clean=template.format(A=first, B=second, S=subject, **scene),
        corrupted=template.format(A=a, B=b, S=s, **scene),
        answer=f" {indirect}",
        distractor=f" {subject}",
    )


def make_ioi(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 50,
    seed: int = 0,
    corruption: str = "abc",
    metric: MetricName = "kl",
    padding_side: str = "right",
) -> Task:
    """Indirect object identification for one tokenizer.

    Args:
        tokenizer: The model's tokenizer; only words that are one token under it are used.
        n: Number of prompt pairs.
        seed: The same seed and tokenizer give the same task on every machine.
        corruption: `"abc"` (three unrelated names) or `"s2_flip"` (the subject's second mention becomes
            the indirect object, as in MIB).
        metric: Default metric of the task.
        padding_side: `"right"` or `"left"`.

    Returns:
        The task; each example's answer is the indirect object, its distractor the subject.

    Raises:
        TaskError: If the corruption is unknown or the tokenizer has too few single-token words.
    """
    if corruption not in CORRUPTIONS:
        raise TaskError(f"task 'ioi' has no corruption {corruption!r}; choose from {', '.join(CORRUPTIONS)}")
    pools: list[tuple[str, ...]] = []
    kinds = (("names", words.NAMES, 5), ("places", words.PLACES, 1), ("objects", words.OBJECTS, 1))
    for kind, candidates, needed in kinds:
        usable = single_token_words(tokenizer, candidates)
        if len(usable) < needed:
            raise TaskError(
                f"task 'ioi' needs {needed} {kind} that are one token, and this tokenizer has "
                f"{len(usable)} of {len(candidates)}"
            )
        pools.append(usable)
    names, places, objects = pools
    rng = random.Random(seed)
    pairs: list[Pair] = []
    failure = ""
    # A failing pair is redrawn; when not even one in twenty passes the tokenizer does not suit the task.
    for _ in range(20 * n + 100):
        if len(pairs) == n:
            break
        outcome = _tokenise(tokenizer, draw(rng, names, places, objects, corruption))
        if isinstance(outcome, Pair):
            pairs.append(outcome)
        else:
            failure = outcome
    if len(pairs) < n:
        raise TaskError(
            f"task 'ioi' could make only {len(pairs)} of {n} prompt pairs; the last failed as {failure}"
        )
    return collate(
        pairs,
        name="ioi",
        metric=metric,
        pad_id=pad_id(tokenizer),
        padding_side=padding_side,
        source={"generator": "ioi", "corruption": corruption, "n": n, "seed": seed},
    )


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: IOIText) -> Pair | str:
    """The pair in tokens, or why it cannot be used."""
    clean, corrupted = encode_prompt(tokenizer, text.clean), encode_prompt(tokenizer, text.corrupted)
    if len(clean) != len(corrupted):
        return f"{text.clean!r} has {len(clean)} tokens and its corrupted prompt {len(corrupted)}"
    if has_unknown(tokenizer, clean) or has_unknown(tokenizer, corrupted):
        return f"{text.clean!r} has words the tokenizer does not know"
    answer = continuation(tokenizer, text.clean, text.answer)
    distractor = continuation(tokenizer, text.clean, text.distractor)
    if answer is None or distractor is None:
        return f"{text.answer!r} or {text.distractor!r} is not one token after {text.clean!r}"
    return Pair(clean, corrupted, (answer,), (distractor,))
