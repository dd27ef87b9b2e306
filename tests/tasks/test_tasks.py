"""Tasks: what the generators promise for every tokenizer."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pahq_hf.errors import ConfigError, MetricError, TaskError
from pahq_hf.tasks import greater_than, ioi, words
from pahq_hf.tasks.base import Pair, collate
from pahq_hf.tasks.catalog import DESCRIPTIONS
from pahq_hf.tasks.generating import draw_pairs
from pahq_hf.tasks.loading import TASKS, available_tasks, load_task
from tests.task_tokenizers import (
    NAMES,
    OBJECTS,
    PLACES,
    byte_level_bpe,
    one_line,
    prompt,
    sentencepiece_like,
    text,
    word_level,
    words_of,
)
from tests.tiers import examples


@pytest.fixture(scope="module")
def gpt2_like() -> PreTrainedTokenizerFast:
    return byte_level_bpe(digits="pairs")


@pytest.fixture(scope="module")
def digit_splitting() -> PreTrainedTokenizerFast:
    return byte_level_bpe(digits="single")


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerFast:
    return sentencepiece_like()


@pytest.fixture(scope="module", params=["gpt2_like", "digit_splitting", "llama_like"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    chosen: PreTrainedTokenizerFast = request.getfixturevalue(request.param)
    return chosen


@pytest.mark.parametrize("name", available_tasks())
def test_generated_pairs_keep_their_promises(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(name, tokenizer, n=30)
    assert len(task) == 30 and task.has_answers and task.has_distractors is (name != "induction")
    assert not torch.equal(task.clean_ids, task.corrupted_ids)
    for row in range(len(task) if name != "induction" else 0):  # its tokens are no text
        assert len(prompt(task, row)) == len(prompt(task, row, corrupted=True))
        # The scored position is the prompt's last token, and tokenising prompt + answer adds that token.
        assert task.answer_positions[row] == task.attention_mask[row].nonzero().max()
        before = tokenizer(text(task, row, tokenizer), add_special_tokens=False)["input_ids"]
        assert prompt(task, row)[-len(before) :] == before
        assert not set(task.answers[row]) & set(task.distractors[row])
        for token in (*task.answers[row], *task.distractors[row]):
            assert 0 <= token < len(tokenizer)


def test_default_number_and_metrics(gpt2_like: PreTrainedTokenizerFast) -> None:
    assert available_tasks() == sorted(TASKS) == sorted(facts.name for facts in DESCRIPTIONS)
    ioi_task, years = load_task("ioi", gpt2_like), load_task("greater_than", gpt2_like)
    assert len(ioi_task) == len(years) == 50
    assert (ioi_task.metric, years.metric) == ("kl", "prob_diff")
    assert load_task("ioi", gpt2_like, metric="logit_diff").metric == "logit_diff"


@given(seed=st.integers(0, 2**32), n=st.integers(1, 12))
@examples(15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_seed_decides_and_smaller_tasks_are_prefixes(
    gpt2_like: PreTrainedTokenizerFast, seed: int, n: int
) -> None:
    for name in available_tasks():
        task = load_task(name, gpt2_like, n=n, seed=seed)
        assert task.fingerprint() == load_task(name, gpt2_like, n=n, seed=seed).fingerprint()
        assert task.fingerprint() != load_task(name, gpt2_like, n=n, seed=seed + 1).fingerprint()
        longer = load_task(name, gpt2_like, n=n + 5, seed=seed)
        assert [prompt(longer, row) for row in range(n)] == [prompt(task, row) for row in range(n)]


def test_texts_are_the_same_on_every_machine() -> None:
    """Pinned: `random.Random` and the word lists decide, nothing of the platform."""
    drawn = ioi.draw(random.Random(0), words.NAMES, words.PLACES, words.OBJECTS)
    assert drawn == ioi.draw(random.Random(0), words.NAMES, words.PLACES, words.OBJECTS)
    assert drawn.clean == PINNED_IOI
    assert greater_than.draw(random.Random(0), words.NOUNS).clean == PINNED_YEARS


PINNED_IOI = "Because Walter and Kyle lived near the zoo, Walter sold a sandwich to"
PINNED_YEARS = "The war lasted from the year 1455 to the year 14"


def test_ioi_answers_are_the_name_said_once_and_the_one_said_twice(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task = load_task("ioi", tokenizer, n=40)
    orders = set()
    for row in range(len(task)):
        spoken = [word for word in words_of(task, row, tokenizer) if word in NAMES]
        (answer,), (distractor,) = (
            [str(tokenizer.decode([token])).strip() for token in tokens]
            for tokens in (task.answers[row], task.distractors[row])
        )
        assert len(spoken) == 3 and spoken.count(answer) == 1 and spoken.count(distractor) == 2
        assert spoken[2] == distractor
        orders.add("ABBA" if spoken[0] == answer else "BABA")
    assert orders == {"ABBA", "BABA"}


def test_ioi_abc_has_three_other_names_and_the_same_scene(gpt2_like: PreTrainedTokenizerFast) -> None:
    task = load_task("ioi", gpt2_like, n=40)
    assert task.source["corruption"] == "abc"
    for row in range(len(task)):
        clean, other = words_of(task, row, gpt2_like), words_of(task, row, gpt2_like, corrupted=True)
        names = [word for word in other if word in NAMES]
        assert len(set(names)) == 3 and not set(names) & set(clean)
        assert [w for w in clean if w not in NAMES] == [w for w in other if w not in NAMES]


@pytest.mark.parametrize("how", [{"corruption": "s2_flip"}, {"name": "ioi:s2_flip"}])
def test_ioi_s2_flip_changes_one_name_into_the_answer(
    how: dict[str, str], gpt2_like: PreTrainedTokenizerFast
) -> None:
    task = load_task(how.pop("name", "ioi"), gpt2_like, n=20, **how)  # type: ignore[arg-type]
    assert task.source["corruption"] == "s2_flip"
    for row in range(len(task)):
        changed = [
            (a, b)
            for a, b in zip(prompt(task, row), prompt(task, row, corrupted=True), strict=True)
            if a != b
        ]
        assert changed == [(task.distractors[row][0], task.answers[row][0])]


def test_ioi_prompts_have_one_length(gpt2_like: PreTrainedTokenizerFast) -> None:
    assert load_task("ioi", gpt2_like, n=60).attention_mask.all()
    assert (
        len(
            {
                len(template.replace(",", " ,").replace(";", " ;").replace(".", " .").split())
                for template in ioi.TEMPLATES
            }
        )
        == 1
    )
    assert len(ioi.TEMPLATES) >= 6 and len(words.NAMES) >= 100 and len(words.NOUNS) >= 60


def test_greater_than_with_two_digit_tokens(gpt2_like: PreTrainedTokenizerFast) -> None:
    task = load_task("greater_than", gpt2_like, n=60)
    assert task.source["continuation"] == "two digits"
    for row in range(len(task)):
        said = words_of(task, row, gpt2_like)
        century, year = said[6][:2], int(said[6][2:])
        assert said == [
            "The",
            said[1],
            "lasted",
            "from",
            "the",
            "year",
            f"{century}{year:02d}",
            "to",
            "the",
            "year",
            century,
        ]
        assert 2 <= year <= 98 and year % 2, "an even year is one token there and must be drawn again"
        assert words_of(task, row, gpt2_like, corrupted=True)[6] == f"{century}01"
        decoded = [
            [int(str(gpt2_like.decode([t]))) for t in ids]
            for ids in (task.answers[row], task.distractors[row])
        ]
        assert decoded == [list(range(year + 1, 100)), list(range(year + 1))]


@pytest.mark.parametrize("which", ["digit_splitting", "llama_like"])
def test_greater_than_with_single_digits(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(which)
    task = load_task("greater_than", tokenizer, n=60)
    assert task.source["continuation"] == "first digit"
    for row in range(len(task)):
        first = int(words_of(task, row, tokenizer)[6][2])
        assert 1 <= first <= 8
        decoded = [
            [int(str(tokenizer.decode([t]))) for t in ids]
            for ids in (task.answers[row], task.distractors[row])
        ]
        assert decoded == [list(range(first + 1, 10)), list(range(first))]


def test_special_tokens_of_the_tokenizer_are_kept(llama_like: PreTrainedTokenizerFast) -> None:
    for name in available_tasks():
        task = load_task(name, llama_like, n=5)
        assert (task.clean_ids[:, 0] == llama_like.bos_token_id).all()
        assert (task.corrupted_ids[:, 0] == llama_like.bos_token_id).all()


def test_generators_refuse_tokenizers_that_do_not_suit() -> None:
    letters = word_level(list("abcdefghijklmnopqrstuvwxyz"))
    with pytest.raises(
        TaskError, match=r"needs 5 names that are one token, and this tokenizer has 0 of 200"
    ) as error:
        load_task("ioi", letters)
    one_line(error)
    no_templates = word_level([f" {word}" for word in (*NAMES, *PLACES, *OBJECTS)])
    with pytest.raises(TaskError, match=r"only 0 of 3 prompt pairs.*does not know"):
        load_task("ioi", no_templates, n=3)
    with pytest.raises(
        TaskError, match=r"two two-digit tokens or into single digits; this one splits.*'173'"
    ) as error:
        load_task("greater_than", byte_level_bpe(digits="triples"))
    one_line(error)
    with pytest.raises(TaskError, match="ends prompts with '<end>'"):
        load_task("ioi", word_level([f" {word}" for word in (*NAMES, *PLACES, *OBJECTS)], end=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ioi", {"n": 0}, "n must be a positive number"),
        ("ioi", {"n": -1}, "n must be a positive number"),
        ("ioi", {"n": 2.5}, "n must be a whole number; got float: 2.5"),
        ("ioi", {"n": "5"}, "n must be a whole number; got str: '5'"),
        ("ioi", {"n": True}, "n must be a whole number; got bool"),
        ("ioi", {"seed": "5"}, "seed must be a whole number"),
        ("data.csv", {"offset": "5"}, "offset must be a whole number"),
        ("ioi", {"n": 10**8}, "at most 100,000 examples of it: n is 100,000,000"),
        ("induction", {"n": 100_001}, "at most 100,000 examples of it: n is 100,001"),
        ([{"clean": "a"}], {}, "the given rows: missing column corrupted"),
        ({"clean": ["a"]}, {}, "the given rows: missing column corrupted"),
        ([], {}, "the given rows: the dataset is empty"),
        (["a"], {}, "a DataFrame or a datasets.Dataset; got list"),
        ({}, {}, "a DataFrame or a datasets.Dataset; got dict"),
        (5, {}, "a data file's or a Hub dataset's name, .*; got int"),
        (None, {}, "a data file's or a Hub dataset's name, .*; got NoneType"),
        ("ioi", {"on_mismatch": "skip"}, "is generated and takes no on_mismatch, which is of data"),
        ("ioi", {"columns": {"clean": "Q"}}, "is generated and takes no columns"),
        ("ioi", {"chat_template": True}, "is generated and takes no chat_template"),
        ("data.csv", {"chat_template": "yes"}, "chat_template is True or False; got str"),
        ("data.csv", {"on_mismatch": "drop"}, "on_mismatch is one of error, skip, pad; got str: 'drop'"),
        ("data.csv", {"answer_tokens": 2}, "answer_tokens is one of one, first, whole; got int: 2"),
        ("data.csv", {"columns": "clean=Q"}, "columns maps our names to the data's, .*; got str"),
        ("data.csv", {"columns": {"cleen": "Q"}}, "columns has no name 'cleen': did you mean 'clean'"),
        ("data.csv", {"columns": {"clean": 3}}, "clean must be a column's name; got int"),
        ("data.csv", {"columns": {"clean": "Q", "corrupted": "Q"}}, "'Q' is named for two columns"),
        ("ioi", {"padding_side": "top"}, "padding_side must be 'left' or 'right', not 'top'"),
        ("ioi", {"corruption": "xyz"}, "no corruption 'xyz'; choose from abc, s2_flip"),
        ("ioi:abc", {"corruption": "s2_flip"}, "contradict"),
        ("greater_than", {"corruption": "abc"}, "no corruption 'abc'"),
        ("ioi", {"split": "test"}, "has no split 'test'"),
        ("oii", {}, "unknown task 'oii'; known tasks are docstring, .*, sva, and a path"),
        ("", {}, "unknown task ''"),
        ("no/such/folder", {}, "unknown task"),
    ],
)
def test_wrong_arguments(
    name: str, options: dict[str, Any], message: str, gpt2_like: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(TaskError, match=message) as error:
        load_task(name, gpt2_like, **options)
    one_line(error)


def test_an_unknown_metric_is_no_task(gpt2_like: PreTrainedTokenizerFast) -> None:
    with pytest.raises(MetricError, match="unknown metric 'kld'; known: kl, ") as error:
        load_task("ioi", gpt2_like, metric="kld")
    one_line(error)


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("sed", "did you mean 'seed'?"),
        ("metrics", "did you mean 'metric'?"),
        ("x", "it knows n, seed, metric, "),
    ],
)
def test_unknown_options_name_the_nearest(
    option: str, advice: str, gpt2_like: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError) as error:
        load_task("ioi", gpt2_like, **{option: 1})  # type: ignore[arg-type]
    assert str(error.value).startswith(f"load_task has no option {option!r}: {advice}")


def test_numbers_of_numpy_are_numbers(gpt2_like: PreTrainedTokenizerFast) -> None:
    number: Any = np.int64(3)
    task = load_task("ioi", gpt2_like, n=number, seed=number)
    assert len(task) == 3
    assert json.loads(json.dumps(task.source))["seed"] == 3


@pytest.mark.parametrize("share", [0, 1 / 500])
def test_what_a_tokenizer_cannot_make_is_given_up_soon(share: float) -> None:
    """A count of attempts, which for a hundred thousand pairs were two million."""
    rng, attempts = random.Random(0), 0

    def attempt() -> Pair | str:
        nonlocal attempts
        attempts += 1
        return Pair([1], [2]) if rng.random() < share else "it fails"

    pairs, failure = draw_pairs(100_000, attempt)
    assert len(pairs) < 50
    assert failure == "it fails"
    assert attempts < 5_000


def test_what_passes_once_in_ten_draws_is_made() -> None:
    rng = random.Random(0)
    pairs, _ = draw_pairs(3_000, lambda: Pair([1], [2]) if rng.random() < 0.1 else "it fails")
    assert len(pairs) == 3_000


def test_generators_need_a_tokenizer() -> None:
    with pytest.raises(TaskError, match="'ioi' is generated for a tokenizer"):
        load_task("ioi")


# ---------------------------------------------------------------- padding and fingerprints


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), side=st.sampled_from(["left", "right"]))
def test_padding_keeps_tokens_and_scores_the_last_one(lengths: list[int], side: str) -> None:
    pairs = [
        Pair([10 * i + j + 1 for j in range(size)], [500 + 10 * i + j for j in range(size)], (i,), (i + 1,))
        for i, size in enumerate(lengths)
    ]
    task = collate(pairs, name="t", metric="kl", padding_side=side, pad_id=999)
    for row, pair in enumerate(pairs):
        assert prompt(task, row) == list(pair.clean)
        assert prompt(task, row, corrupted=True) == list(pair.corrupted)
        assert task.clean_ids[row, task.answer_positions[row]] == pair.clean[-1]
        start = task.length - lengths[row] if side == "left" else 0
        assert task.position_ids[row, start : start + lengths[row]].tolist() == list(range(lengths[row]))
