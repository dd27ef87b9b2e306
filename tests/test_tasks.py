"""Tasks: what the generators promise for every tokenizer, and what a user's own data may look like."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from pahq_hf.errors import TaskError
from pahq_hf.tasks import TASKS, available_tasks, greater_than, ioi, load_task, words
from pahq_hf.tasks.base import Pair, Task, collate

NAMES, PLACES, OBJECTS, NOUNS = words.NAMES[:40], words.PLACES[:8], words.OBJECTS[:8], words.NOUNS[:30]
TEXT_WORDS = sorted(
    {
        word.strip(".,;")
        for template in (*ioi.TEMPLATES, "The lasted from the year to")
        for word in template.split()
        if "{" not in word
    }
)


def byte_level_bpe(*, digits: str) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer whose words are whole.

    Args:
        digits: `"pairs"` splits " 1732" into " 17" and "32" as GPT-2 mostly does, `"single"` into " ", "1",
            "7", "3", "2" as SmolLM2 does, `"triples"` into " ", "173", "2" as Llama 3 does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: index for index, letter in enumerate(alphabet, start=1)}}
    merges: list[tuple[str, str]] = []

    def learn(text: str) -> None:
        """Merge the text from left to right."""
        left = text[0]
        for letter in text[1:]:
            if (left, letter) not in seen:
                seen.add((left, letter))
                merges.append((left, letter))
                vocabulary.setdefault(left + letter, len(vocabulary))
            left += letter

    seen: set[tuple[str, str]] = set()
    if digits == "pairs":
        # "Ġ" is the byte-level letter of a space.
        for value in range(100):
            learn(f"{value:02d}")
        for century in greater_than.CENTURIES:
            learn_pair = ("Ġ", f"{century}")
            merges.append(learn_pair)
            vocabulary["".join(learn_pair)] = len(vocabulary)
    if digits == "triples":
        for value in range(1000):
            learn(f"{value:03d}")
    for word in ("the", *TEXT_WORDS, *NAMES, *PLACES, *OBJECTS, *NOUNS):
        learn(f"Ġ{word}")
        learn(word)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = {
        "pairs": pre_tokenizers.Split(Regex(r" ?[0-9]+"), "isolated"),
        "single": pre_tokenizers.Digits(individual_digits=True),
        "triples": pre_tokenizers.Split(Regex(r"[0-9]{1,3}"), "isolated"),
    }[digits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer: a mark before every text, single digits, a BOS."""
    pieces = ["<unk>", "<s>", "▁", *"0123456789", ".", ",", ";"]
    pieces += [f"▁{word}" for word in ("the", *TEXT_WORDS, *NAMES, *PLACES, *OBJECTS, *NOUNS)]
    scored = [(piece, -float(index) / 100) for index, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def word_level(vocabulary: list[str], *, end: bool = False) -> PreTrainedTokenizerFast:
    """Whole words with their leading space; `end` closes every text with an end-of-text token."""
    ids = {word: index for index, word in enumerate(["<unk>", "<end>", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w ]"), "isolated")
    if end:
        tokenizer.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


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


def prompt(task: Task, row: int, *, corrupted: bool = False) -> list[int]:
    """An example's real tokens."""
    ids = task.corrupted_ids if corrupted else task.clean_ids
    return ids[row][task.attention_mask[row].bool()].tolist()


def text(task: Task, row: int, tokenizer: PreTrainedTokenizerFast, *, corrupted: bool = False) -> str:
    """An example as text, without special tokens."""
    return str(tokenizer.decode(prompt(task, row, corrupted=corrupted), skip_special_tokens=True))


def words_of(
    task: Task, row: int, tokenizer: PreTrainedTokenizerFast, *, corrupted: bool = False
) -> list[str]:
    """An example's words without punctuation."""
    return text(task, row, tokenizer, corrupted=corrupted).translate(str.maketrans(".,;", "   ")).split()


def one_line(error: pytest.ExceptionInfo[TaskError]) -> str:
    """The message, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---------------------------------------------------------------- generators


@pytest.mark.parametrize("name", available_tasks())
def test_generated_pairs_keep_their_promises(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(name, tokenizer, n=30)
    assert len(task) == 30 and task.has_answers and task.has_distractors
    assert not torch.equal(task.clean_ids, task.corrupted_ids)
    for row in range(len(task)):
        assert len(prompt(task, row)) == len(prompt(task, row, corrupted=True))
        # The scored position is the prompt's last token, and tokenising prompt + answer adds that token.
        assert task.answer_positions[row] == task.attention_mask[row].nonzero().max()
        before = tokenizer(text(task, row, tokenizer), add_special_tokens=False)["input_ids"]
        assert prompt(task, row)[-len(before) :] == before
        assert not set(task.answers[row]) & set(task.distractors[row])
        for token in (*task.answers[row], *task.distractors[row]):
            assert 0 <= token < len(tokenizer)


def test_default_number_and_metrics(gpt2_like: PreTrainedTokenizerFast) -> None:
    assert available_tasks() == sorted(TASKS) == ["greater_than", "ioi"]
    ioi_task, years = load_task("ioi", gpt2_like), load_task("greater_than", gpt2_like)
    assert len(ioi_task) == len(years) == 50
    assert (ioi_task.metric, years.metric) == ("kl", "prob_diff")
    assert load_task("ioi", gpt2_like, metric="logit_diff").metric == "logit_diff"


@given(seed=st.integers(0, 2**32), n=st.integers(1, 12))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    import random

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
        assert 2 <= year <= 98
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
        ("ioi", {"metric": "kld"}, "unknown metric 'kld'; choose from kl, "),
        ("ioi", {"padding_side": "top"}, "padding_side must be 'left' or 'right', not 'top'"),
        ("ioi", {"corruption": "xyz"}, "no corruption 'xyz'; choose from abc, s2_flip"),
        ("ioi:abc", {"corruption": "s2_flip"}, "contradict"),
        ("greater_than", {"corruption": "abc"}, "no corruption 'abc'"),
        ("ioi", {"split": "test"}, "has no split 'test'"),
        ("oii", {}, "unknown task 'oii'; known tasks are greater_than, ioi, and a path"),
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


ROWS: list[dict[str, Any]] = [
    {
        "clean": "When Aaron went",
        "corrupted": "When Adam went",
        "answer": " to",
        "distractor": [" the", " from"],
    },
    {"clean": "Then Alan", "corrupted": "Then Amy", "answer": [" went"], "distractor": " to"},
]


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a file, as a dataset folder, or as saved splits."""
    path = folder / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            for row in rows:
                writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    else:
        # Arrow has one type per column.
        listed = [
            {k: v if k[0] == "c" else ([v] if isinstance(v, str) else v) for k, v in row.items()}
            for row in rows
        ]
        if suffix == ".parquet":
            Dataset.from_list(listed).to_parquet(path)
        elif suffix == "-saved":
            DatasetDict(test=Dataset.from_list(listed)).save_to_disk(path)
        else:
            path.mkdir()
            Dataset.from_list(listed).to_parquet(path / "train.parquet")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", "-folder", "-saved"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_format_gives_the_same_task(
    suffix: str, side: str, tmp_path: Path, gpt2_like: PreTrainedTokenizerFast
) -> None:
    task = load_task(write(tmp_path, suffix, ROWS), gpt2_like, padding_side=side)
    assert [text(task, row, gpt2_like) for row in range(2)] == [row["clean"] for row in ROWS]
    assert [text(task, row, gpt2_like, corrupted=True) for row in range(2)] == [
        row["corrupted"] for row in ROWS
    ]
    one = gpt2_like.convert_tokens_to_ids
    assert task.answers == ((one("Ġto"),), (one("Ġwent"),))
    assert task.distractors == ((one("Ġthe"), one("Ġfrom")), (one("Ġto"),))
    assert task.answer_positions.tolist() == ([2, 2] if side == "left" else [2, 1])
    assert task.metric == "kl" and task.source["dataset"] == str(tmp_path / f"data{suffix}")


def test_csv_keeps_text_as_written(tmp_path: Path, gpt2_like: PreTrainedTokenizerFast) -> None:
    """Neither zeros in front nor a space nor a name like NA may be lost to a guess at the column's type."""
    path = tmp_path / "years.csv"
    path.write_text("clean,corrupted,answer,distractor\nyear 17,year 16,05,04\nyear 11,year 12,99,\n")
    task = load_task(path, gpt2_like)
    two = gpt2_like.convert_tokens_to_ids
    assert task.answers == ((two("05"),), (two("99"),))
    assert task.distractors == ((two("04"),), ())
    assert task.has_answers and not task.has_distractors


def test_sentencepiece_answers_may_have_their_space(
    tmp_path: Path, llama_like: PreTrainedTokenizerFast
) -> None:
    """Alone, " Amy" and a digit are two tokens there, a mark in front; after the prompt each is one."""
    rows: list[dict[str, Any]] = [
        {"clean": "Then Alan", "corrupted": "Then Adam", "answer": " Amy", "distractor": "Aaron"},
        {"clean": "the year 17", "corrupted": "the year 16", "answer": ["3", "4"], "distractor": "1"},
    ]
    task = load_task(write(tmp_path, ".jsonl", rows), llama_like)
    one = llama_like.convert_tokens_to_ids
    assert task.answers == ((one("▁Amy"),), (one("3"), one("4")))
    assert task.distractors == ((one("▁Aaron"),), (one("1"),))


IDS: list[dict[str, Any]] = [
    {"clean_ids": [5, 6, 7], "corrupted_ids": [5, 8, 7], "answer_ids": [1], "distractor_ids": [2, 3]},
    {"clean_ids": [9, 9], "corrupted_ids": [9, 4], "answer_ids": [4], "distractor_ids": []},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_token_ids_need_no_tokenizer(suffix: str, tmp_path: Path) -> None:
    task = load_task(write(tmp_path, suffix, IDS))
    assert [prompt(task, row) for row in range(2)] == [row["clean_ids"] for row in IDS]
    assert [prompt(task, row, corrupted=True) for row in range(2)] == [row["corrupted_ids"] for row in IDS]
    assert task.answers == ((1,), (4,)) and task.distractors == ((2, 3), ())


def test_token_ids_with_answers_as_text(tmp_path: Path, gpt2_like: PreTrainedTokenizerFast) -> None:
    ids = [gpt2_like(word)["input_ids"] for word in ("Then Alan", "Then Adam")]
    path = write(tmp_path, ".jsonl", [{"clean_ids": ids[0], "corrupted_ids": ids[1], "answer": " went"}])
    assert load_task(path, gpt2_like).answers == ((gpt2_like.convert_tokens_to_ids("Ġwent"),),)
    with pytest.raises(TaskError, match="example 0: column answer is text, so a tokenizer is needed"):
        load_task(path)


def test_n_limits_data_but_has_no_default(tmp_path: Path, gpt2_like: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, ".jsonl", ROWS * 40)
    assert len(load_task(path, gpt2_like)) == 80
    assert len(load_task(path, gpt2_like, n=3)) == 3
    assert len(load_task(write(tmp_path, "-saved", ROWS), gpt2_like, n=1)) == 1


def test_splits(tmp_path: Path, gpt2_like: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "splits"
    parts = {
        name: Dataset.from_list([{"clean": "Then Alan", "corrupted": f"Then {name}"}])
        for name in ("Adam", "train", "Amy")
    }
    del parts["train"]
    DatasetDict(**parts).save_to_disk(path)
    assert text(load_task(path, gpt2_like), 0, gpt2_like, corrupted=True) == "Then Adam"
    assert text(load_task(path, gpt2_like, split="Amy"), 0, gpt2_like, corrupted=True) == "Then Amy"
    with pytest.raises(TaskError, match="no split 'test'; it has Adam, Amy"):
        load_task(path, gpt2_like, split="test")


def test_fingerprint_follows_the_data(tmp_path: Path, gpt2_like: PreTrainedTokenizerFast) -> None:
    prints = [load_task(write(tmp_path, ".jsonl", ROWS), gpt2_like).fingerprint()]
    assert load_task(write(tmp_path, ".parquet", ROWS), gpt2_like).fingerprint() == prints[0]
    for change in (
        {"clean": "When Amy went"},
        {"corrupted": "When Amy went"},
        {"answer": " at"},
        {"distractor": " at"},
    ):
        # The same path again: an edited file must not be served from a cache.
        for suffix in (".jsonl", ".parquet"):
            edited = load_task(write(tmp_path, suffix, [{**ROWS[0], **change}, ROWS[1]]), gpt2_like)
        prints.append(edited.fingerprint())
    prints.append(load_task(tmp_path / "data.jsonl", gpt2_like, padding_side="left").fingerprint())
    prints.append(load_task(tmp_path / "data.jsonl", gpt2_like, n=1).fingerprint())
    assert len(set(prints)) == len(prints)


# ---------------------------------------------------------------- MIB


def mib_row(subject: str, indirect: str, **counterfactuals: str) -> dict[str, Any]:
    """A row as in mib-bench/ioi."""
    return {
        "prompt": f"Then {subject} and {indirect} met. {subject} gave a bag to",
        "choices": [indirect, subject],
        "answerKey": 0,
        **{
            f"{kind}_counterfactual": {"prompt": prompt, "answerKey": 1}
            for kind, prompt in counterfactuals.items()
        },
    }


def test_mib_columns(tmp_path: Path, gpt2_like: PreTrainedTokenizerFast) -> None:
    rows = [
        mib_row(
            a,
            b,
            abc="Then Carl and Chris met. Ben gave a bag to",
            s2_io_flip=f"Then {a} and {b} met. {b} gave a bag to",
        )
        for a, b in (("Alan", "Amy"), ("Zebulon", "Amy"), ("Adam", "Anna"))
    ]
    path = tmp_path / "mib.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = load_task(path, gpt2_like)
    # As in MIB, what cannot be paired is left out; the task says how much.
    assert len(task) == 2 and task.source["skipped"] == 1 and task.source["corruption"] == "s2_io_flip"
    assert text(task, 1, gpt2_like, corrupted=True) == "Then Adam and Anna met. Anna gave a bag to"
    assert task.answers[0] == (gpt2_like.convert_tokens_to_ids("ĠAmy"),)
    assert task.distractors[0] == (gpt2_like.convert_tokens_to_ids("ĠAlan"),)
    other = load_task(path, gpt2_like, corruption="abc")
    assert text(other, 0, gpt2_like, corrupted=True) == "Then Carl and Chris met. Ben gave a bag to"
    with pytest.raises(TaskError, match="no corruption 'xyz'; the data has abc, s2_io_flip"):
        load_task(path, gpt2_like, corruption="xyz")
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(
        TaskError,
        match=r"none of the 1 examples can be used; the last: .*example 0: distractor ' Zebulon' is 8",
    ) as error:
        load_task(path, gpt2_like)
    one_line(error)


# ---------------------------------------------------------------- every way data can be wrong

GOOD = {"clean": "Then Alan", "corrupted": "Then Adam"}
GOOD_IDS = {"clean_ids": [1, 2], "corrupted_ids": [1, 3]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"clean": "Then Alan", "wrong": "x"}], "missing column corrupted; it needs clean and corrupted"),
        ([{"a": 1}], r"missing columns clean, corrupted; .* has a$"),
        ([{"prompt": "Then"}], "missing columns clean, corrupted .*or MIB's prompt, choices"),
        (
            [GOOD, {**GOOD, "corrupted": "Then Adam went"}],
            "example 1: .* has 2 tokens and the corrupted one 3",
        ),
        ([GOOD, {"clean": "Then Alan"}], "example 1: column corrupted must be a non-empty text, found None"),
        ([GOOD, {**GOOD, "clean": ""}], "example 1: column clean must be a non-empty text"),
        ([{**GOOD, "clean": 3}], "example 0: column clean must be a non-empty text, found 3"),
        (
            [GOOD, {**GOOD, "answer": " went to"}],
            r"example 1: answer ' went to' is 2 tokens \[' went', ' to'\]",
        ),
        ([{**GOOD, "distractor": [" to", " xq"]}], "example 0: distractor ' xq' is 3 tokens"),
        ([{**GOOD, "answer": 5}], "example 0: column answer must hold text or a list of texts, found 5"),
        ([{**GOOD, "answer": [" to", ""]}], "example 0: column answer must hold text"),
        ([{**GOOD, "answer": " to", "distractor": [" at", " to"]}], "is both an answer and a distractor"),
        ([{**GOOD, "corrupted": "Then Alan"}], "every corrupted prompt equals its clean one"),
        ([GOOD_IDS, {**GOOD_IDS, "clean_ids": [1]}], "example 1: .* has 1 tokens and the corrupted one 2"),
        (
            [{**GOOD_IDS, "clean_ids": [1, 10**6]}],
            "token id 1000000 in column clean_ids is outside the vocabulary of",
        ),
        ([{**GOOD_IDS, "answer_ids": [-1]}], "token id -1 in column answer_ids is outside"),
        ([{**GOOD_IDS, "clean_ids": "word"}], "column clean_ids must be a list of token ids, found 'word'"),
        ([{**GOOD_IDS, "clean_ids": [1, "x"]}], "column clean_ids must be a list of token ids"),
        ([{**GOOD_IDS, "clean_ids": [1, True]}], "column clean_ids must be a list of token ids"),
        ([{**GOOD_IDS, "clean_ids": None}], "column clean_ids must be a list of token ids, found None"),
        ([{**GOOD_IDS, "clean_ids": [], "corrupted_ids": []}], "the clean prompt has no tokens"),
    ],
)
def test_unusable_examples(
    rows: list[dict[str, Any]], message: str, tmp_path: Path, gpt2_like: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path, ".jsonl", rows)
    with pytest.raises(TaskError, match=message) as error:
        load_task(path, gpt2_like)
    assert str(path) in one_line(error)


def test_unknown_words_of_a_word_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = word_level(["Then", " Alan", " Adam", " went"])
    rows = [{**GOOD, "answer": " flew"}]
    with pytest.raises(TaskError, match="example 0: answer ' flew' is not in the tokenizer's vocabulary"):
        load_task(write(tmp_path, ".jsonl", rows), tokenizer)


Spoil = Callable[[Path], Path]


def _file(name: str, content: bytes) -> Spoil:
    def spoil(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder / "none.jsonl", "no such file or dataset folder"),
        (lambda folder: folder / "none", "no such file or dataset folder"),
        (_file("data.jsonl", b'{"clean": "a", "corrupted": "b"}\n\n{"clean": '), "line 3: not valid JSON"),
        (_file("data.jsonl", b"[1, 2]\n"), r"line 1: expected an object with named columns, found \[1, 2\]"),
        (_file("data.json", b'[{"clean": "a"}, 7]'), "item 2: expected an object"),
        (_file("data.json", b'[{"clean": "a"'), "not valid JSON"),
        (_file("data.jsonl", b"\xff\xfe\x00"), "cannot be read as UTF-8 text"),
        (_file("data.jsonl", b"\n\n"), "the dataset is empty"),
        (_file("data.json", b"[]"), "the dataset is empty"),
        (_file("data.csv", b"clean,corrupted\n"), "the dataset is empty"),
        (_file("data.csv", b""), "the dataset is empty"),
        (_file("data.csv", b"clean,corrupted\na,b,c\n"), "line 2: more cells than the header"),
        (_file("data.csv", b'clean,corrupted\n"a"x,b\n'), "line 2: not valid CSV"),
        (_file("data.parquet", b"PAR0"), "not a readable Parquet file"),
        (_file("data.txt", b"hello"), "cannot read .txt; use .jsonl, .json, .csv, .parquet"),
        (_file("data", b"hello"), "cannot read a file without extension"),
        (lambda folder: folder, "could not be loaded as a dataset folder"),
    ],
)
def test_unreadable_data(
    spoil: Spoil, message: str, tmp_path: Path, gpt2_like: PreTrainedTokenizerFast
) -> None:
    path = spoil(tmp_path)
    with pytest.raises(TaskError, match=message) as error:
        load_task(path, gpt2_like)
    assert str(path) in one_line(error)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="a tokenizer is needed"):
        load_task(write(tmp_path, ".jsonl", ROWS))


def test_a_hub_dataset_that_cannot_be_reached(gpt2_like: PreTrainedTokenizerFast) -> None:
    """Tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        TaskError, match="'nobody/no-such-data' could not be loaded as a dataset on the Hub"
    ) as error:
        load_task("nobody/no-such-data", gpt2_like)
    one_line(error)
