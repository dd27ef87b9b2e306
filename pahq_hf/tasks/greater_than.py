"""Greater-than: "The war lasted from the year 1732 to the year 17" -> any two digits above 32."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pahq_hf.errors import TaskError
from pahq_hf.tasks import words
from pahq_hf.tasks.base import Pair, Task, collate
from pahq_hf.tasks.generating import check_corruption, draw_pairs
from pahq_hf.tasks.metrics import default_metric
from pahq_hf.tasks.tokenization import (
    continuation,
    encode,
    encode_prompt,
    has_unknown,
    pad_id,
    show,
    single_token_words,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "The {noun} lasted from the year {century}{year:02d} to the year {century}"
CENTURIES = tuple(range(11, 18))
CORRUPTED_YEAR = 1
CORRUPTIONS = ("01",)


@dataclass(frozen=True)
class YearText:
    """One prompt pair as text.

    Attributes:
        clean: The prompt.
        corrupted: The same prompt, starting in year 01 of the century.
        stem: The prompt up to the century of its first year.
        year: Last two digits of the first year.
    """

    clean: str
    corrupted: str
    stem: str
    year: int


def draw(rng: random.Random, nouns: tuple[str, ...], first: int = 2, last: int = 98) -> YearText:
    """Draw one prompt pair.

    Args:
        rng: Source of randomness.
        nouns: At least one noun.
        first: Smallest two-digit year.
        last: Largest two-digit year.

    Returns:
        The pair.
    """
    noun, century, year = rng.choice(nouns), rng.choice(CENTURIES), rng.randint(first, last)
    clean = TEMPLATE.format(noun=noun, century=century, year=year)
    corrupted = TEMPLATE.format(noun=noun, century=century, year=CORRUPTED_YEAR)
    return YearText(clean, corrupted, clean[: clean.index(f"{year:02d} to")], year)


def make_greater_than(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 50,
    seed: int = 0,
    corruption: str = "01",
    metric: str | None = None,
    padding_side: str = "right",
) -> Task:
    """Greater-than for one tokenizer.

    Where two digits are one token, the answers are all two-digit tokens above the year and the
    distractors all others. Where every digit is its own token, the answers are the first digits above the
    year's first digit and the distractors those below; the equal digit proves nothing and is left out.

    Args:
        tokenizer: The model's tokenizer.
        n: Number of prompt pairs.
        seed: The same seed and tokenizer give the same task on every machine.
        corruption: `"01"`, the only one: the first year becomes year 01 of its century.
        metric: Default metric of the task; the one that is usual of it if None.
        padding_side: `"right"` or `"left"`.

    Returns:
        The task.

    Raises:
        TaskError: If the corruption is unknown or the tokenizer splits years in neither way.
    """
    check_corruption("greater_than", corruption, CORRUPTIONS)
    # Nouns of one token give the task one prompt length; a small vocabulary uses whatever there is.
    nouns = single_token_words(tokenizer, words.NOUNS)
    nouns = nouns if len(nouns) >= 20 else words.NOUNS
    for splitting in splittings(tokenizer):
        pairs = _pairs(tokenizer, splitting, nouns, n, random.Random(seed))
        if pairs:
            return collate(
                pairs,
                name="greater_than",
                metric=metric or default_metric("greater_than"),
                pad_id=pad_id(tokenizer),
                padding_side=padding_side,
                source={
                    "generator": "greater_than",
                    "corruption": corruption,
                    "continuation": splitting.name,
                    "n": n,
                    "seed": seed,
                },
            )
    sample = TEMPLATE.format(noun="war", century=17, year=32)
    raise TaskError(
        "task 'greater_than' needs a tokenizer that splits years into two two-digit tokens or into single "
        f"digits; this one splits {sample!r} as {show(tokenizer, encode(tokenizer, sample))}"
    )


@dataclass(frozen=True)
class Splitting:
    """How a tokenizer splits the last two digits of a year.

    Attributes:
        name: Shown in the task's provenance.
        tokens: Token of every value a continuation can have, empty if the tokenizer lacks some.
        unit: What one step of the continuation counts: 1 for two digits in one token, 10 for the first digit.
        first: Smallest year that leaves both answers and distractors.
        last: Largest such year.
    """

    name: str
    tokens: dict[int, int]
    unit: int
    first: int
    last: int


def splittings(tokenizer: PreTrainedTokenizerBase) -> list[Splitting]:
    """Ways in which a tokenizer may split years: those that it has all tokens of, the likelier first."""
    both = (_two_digit_splitting(tokenizer), _digit_splitting(tokenizer))
    return [splitting for splitting in both if splitting.tokens]


def _two_digit_splitting(tokenizer: PreTrainedTokenizerBase) -> Splitting:
    vocabulary = tokenizer.get_vocab()
    tokens = {value: vocabulary[f"{value:02d}"] for value in range(100) if f"{value:02d}" in vocabulary}
    return Splitting("two digits", tokens if len(tokens) == 100 else {}, unit=1, first=2, last=98)


def _digit_splitting(tokenizer: PreTrainedTokenizerBase) -> Splitting:
    found = {value: continuation(tokenizer, "the year 17", str(value)) for value in range(10)}
    tokens = {value: token for value, token in found.items() if token is not None}
    return Splitting("first digit", tokens if len(tokens) == 10 else {}, unit=10, first=10, last=89)


def _pairs(
    tokenizer: PreTrainedTokenizerBase,
    splitting: Splitting,
    nouns: tuple[str, ...],
    n: int,
    rng: random.Random,
) -> list[Pair]:
    """`n` pairs, or none if the tokenizer does not split years that way."""

    def attempt() -> Pair | str:
        # GPT-2 keeps some years whole.
        text = draw(rng, nouns, splitting.first, splitting.last)
        return _tokenise(tokenizer, text, splitting) or f"{text.clean!r} splits another way"

    pairs, _ = draw_pairs(n, attempt)
    return pairs if len(pairs) == n else []


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: YearText, splitting: Splitting) -> Pair | None:
    """The pair in tokens, or None if its years do not split that way."""
    clean, corrupted = encode_prompt(tokenizer, text.clean), encode_prompt(tokenizer, text.corrupted)
    if len(clean) != len(corrupted) or has_unknown(tokenizer, clean):
        return None
    found = answer_sets(tokenizer, text, splitting)
    return None if found is None else Pair(clean, corrupted, *found)


def answer_sets(
    tokenizer: PreTrainedTokenizerBase, text: YearText, splitting: Splitting
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What continues a prompt rightly and wrongly, or None if its years do not split that way.

    Args:
        tokenizer: The model's tokenizer.
        text: The prompt.
        splitting: How years are split.
    """
    tokens, pivot = splitting.tokens, text.year // splitting.unit
    digits = [tokens[pivot]] if splitting.unit == 1 else [tokens[pivot], tokens[text.year % 10]]
    # The year must be its century's tokens and then those of its last digits: only then is the century at
    # the end of the prompt followed by a token of the same kind.
    start = encode(tokenizer, text.stem) + digits
    if encode(tokenizer, f"{text.stem}{text.year:02d}") != start:
        return None
    if encode(tokenizer, text.clean)[: len(start)] != start:
        return None
    answers = tuple(token for value, token in tokens.items() if value > pivot)
    # With two digits the same year is a wrong answer; the same first digit proves nothing.
    distractors = tuple(
        token for value, token in tokens.items() if value < pivot or (value == pivot and splitting.unit == 1)
    )
    return answers, distractors
