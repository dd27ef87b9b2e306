"""The generators of docstring, induction, gendered pronouns and agreement."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pahq_hf.errors import TaskError
from pahq_hf.tasks import docstring, gendered_pronoun, induction, sva, words
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.catalog import DESCRIPTIONS
from pahq_hf.tasks.loading import TASKS, load_task
from pahq_hf.tasks.metrics import Metric
from tests.task_tokenizers import (
    NAMES,
    byte_level_bpe,
    one_line,
    prompt,
    sentencepiece_like,
    text,
    word_level,
    words_of,
)
from tests.tiers import examples

NEW = ("docstring", "gendered_pronoun", "induction", "sva")


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return byte_level_bpe(digits="pairs") if request.param == "bpe" else sentencepiece_like()


def decoded(tokens: tuple[int, ...], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode([token])).strip() for token in tokens]


def changes(task: Task, row: int, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Words that differ between an example's two prompts."""
    both = words_of(task, row, tokenizer), words_of(task, row, tokenizer, corrupted=True)
    return [(a, b) for a, b in zip(*both, strict=True) if a != b]


def test_word_lists_are_what_they_say() -> None:
    assert set(words.MEN) | set(words.WOMEN) <= set(words.NAMES)
    assert not set(words.MEN) & set(words.WOMEN)
    for noun in (*words.SUBJECTS, *words.ATTRACTORS):
        assert not noun.endswith(("s", "x", "ch", "sh")) and noun[-2:] not in ("ry", "ty"), noun
    for listed in (words.MEN, words.WOMEN, words.ADJECTIVES, words.ROLES, words.ARGUMENTS, words.SUBJECTS):
        assert len(set(listed)) == len(listed)
    assert not [word for word in words.ADJECTIVES if word[0] in "aeiou"]


def test_catalog_says_what_the_generators_do() -> None:
    for facts in DESCRIPTIONS:
        defaults = inspect.signature(TASKS[facts.name]).parameters
        assert defaults["corruption"].default == facts.corruptions[0]


@pytest.mark.parametrize("name", NEW)
def test_corruptions_are_checked(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TaskError, match=f"{name!r} has no corruption 'abc'; choose from ") as error:
        load_task(name, tokenizer, corruption="abc")
    one_line(error)


def test_pronoun_follows_the_name(tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task("gendered_pronoun", tokenizer, n=40)
    seen = set()
    for row in range(len(task)):
        ((name, other),) = changes(task, row, tokenizer)
        woman = name in words.WOMEN
        assert (name if woman else other) in words.WOMEN and (other if woman else name) in words.MEN
        right, wrong = decoded(task.answers[row], tokenizer), decoded(task.distractors[row], tokenizer)
        assert (right, wrong) == ((["she"], ["he"]) if woman else (["he"], ["she"]))
        seen.add(woman)
    assert seen == {True, False}
    assert task.source["corruption"] == "other_gender"


def test_verb_agrees_with_the_subject_and_not_with_the_nearest_noun(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task = load_task("sva", tokenizer, n=60)
    seen = set()
    for row in range(len(task)):
        ((subject, other),) = changes(task, row, tokenizer)
        assert {subject, other} == set(sva.both_numbers(min(subject, other, key=len)))
        plural = subject.endswith("s")
        assert decoded(task.answers[row], tokenizer) == ["are" if plural else "is"]
        assert decoded(task.distractors[row], tokenizer) == ["is" if plural else "are"]
        seen.add((plural, words_of(task, row, tokenizer)[-1].endswith("s")))
    assert len(seen) == 4, "both numbers of both nouns"


def test_docstring_asks_for_the_third_argument(tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task("docstring", tokenizer, n=20)
    for row in range(len(task)):
        clean, other = text(task, row, tokenizer), text(task, row, tokenizer, corrupted=True)
        assert clean.endswith(":param") and clean.count(":param") == 3
        arguments = clean[clean.index("(self, ") + 7 : clean.index(")")].split(", ")
        documented = [line.split(":")[1].split()[1] for line in clean.splitlines() if ":param " in line]
        assert documented == arguments[:2]
        assert decoded(task.answers[row], tokenizer) == arguments[2:3]
        assert set(decoded(task.distractors[row], tokenizer)) == {*arguments[:2], arguments[3]}
        # The corrupted prompt keeps everything but the names.
        assert not set(arguments) & set(other.replace(",", " ").replace(")", " ").replace(":", " ").split())
        assert len(other.splitlines()) == len(clean.splitlines()) == 6


@examples(20)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 6))
def test_every_token_of_the_second_copy_is_scored(seed: int, n: int) -> None:
    tokenizer = sentencepiece_like()  # with a BOS
    task = load_task("induction", tokenizer, n=n, seed=seed)
    length, ordinary = induction.LENGTH, set(induction.ordinary_tokens(tokenizer))
    assert task.answer_rows.tolist() == sorted(task.answer_rows.tolist())
    assert len(task.answers) == n * (length - 1)
    for row in range(n):
        clean, other = prompt(task, row), prompt(task, row, corrupted=True)
        first, second = clean[1 : 1 + length], clean[1 + length :]
        assert clean[0] == other[0] == tokenizer.bos_token_id
        assert second == first[:-1] and set(first) <= ordinary and len(set(first)) == length
        assert other[1 + length :] == second and not set(other[1 : 1 + length]) & set(first)
        mine = (task.answer_rows == row).nonzero().flatten().tolist()
        assert [task.answers[k] for k in mine] == [(token,) for token in first[1:]]
        for k, scored in zip(mine, second, strict=True):
            assert clean[int(task.answer_positions[k])] == scored


def test_induction_draws_no_special_or_reserved_token() -> None:
    plain = word_level([f" {word}" for word in NAMES])
    assert len(induction.ordinary_tokens(plain)) == len(NAMES)
    reserved = word_level([*(f" {word}" for word in NAMES), "<unused0>", "<0x0A>", "[PAD]", "12"])
    reserved.add_special_tokens({"additional_special_tokens": ["special"]})
    reserved.add_tokens(["added"])
    assert induction.ordinary_tokens(reserved) == induction.ordinary_tokens(plain)


@pytest.mark.parametrize(
    ("name", "vocabulary", "message"),
    [
        ("induction", list("abc"), "'induction' needs 20 tokens that are words .* has 4"),
        ("gendered_pronoun", [" the"], "'gendered_pronoun' needs 1 men's names that are one token"),
        ("sva", ["the", " key", " cabinet"], "'sva' needs 1 plural subjects"),
        ("docstring", [" the", " name"], "'docstring' needs 18 nouns that are one token"),
        ("docstring", ["the", *(f" {w}" for w in words.ARGUMENTS)], "only 0 of 50 .* does not know"),
    ],
)
def test_tokenizers_that_do_not_suit(name: str, vocabulary: list[str], message: str) -> None:
    with pytest.raises(TaskError, match=message) as error:
        load_task(name, word_level([*vocabulary, "the"]))
    one_line(error)


def test_texts_are_the_same_on_every_machine() -> None:
    """Pinned: `random.Random` and the word lists decide, nothing of the platform."""
    assert gendered_pronoun.draw(random.Random(0), gendered_pronoun.Scene()).clean == PINNED_PRONOUN
    assert sva.draw(random.Random(0), words.SUBJECTS, words.ATTRACTORS).clean == PINNED_AGREEMENT
    assert docstring.draw(random.Random(0), words.ARGUMENTS).answer == PINNED_ARGUMENT


PINNED_PRONOUN = "So Kenneth is a decent worker, isn't"
PINNED_AGREEMENT = "The doctors behind the building"
PINNED_ARGUMENT = " name"


@pytest.mark.smollm2
@torch.no_grad()
@pytest.mark.exhaustive
def test_a_real_model_does_the_tasks(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()

    def judge(name: str, *, corrupted: bool = False) -> tuple[float, float]:
        """How often the best answer beats the best distractor, and the task's metric."""
        task = load_task(name, tokenizer, n=16)
        ids = task.corrupted_ids if corrupted else task.clean_ids
        states = model.model(input_ids=ids, attention_mask=task.attention_mask).last_hidden_state
        logits = model.lm_head(states[task.answer_rows, task.answer_positions])
        sets = zip(logits, task.answers, task.distractors, strict=True)
        right = [float(row[list(a)].max() > (row[list(d)] if d else row).max()) for row, a, d in sets]
        return sum(right) / len(right), Metric(task.metric, task)(logits)

    for name in ("gendered_pronoun", "sva"):
        assert judge(name)[0] > 0.8
        assert judge(name, corrupted=True)[0] < 0.2
    # One of four arguments by chance, and the corrupted prompt names none of them.
    assert judge("docstring")[0] > 0.8 and judge("docstring", corrupted=True)[0] < 0.5
    assert judge("induction")[1] < judge("induction", corrupted=True)[1] - 5
