"""A user's own data: every format it may have, and every way it can be wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from pahq_hf.errors import TaskError
from pahq_hf.tasks.loading import load_task
from tests.task_tokenizers import byte_level_bpe, one_line, prompt, sentencepiece_like, text, word_level


@pytest.fixture(scope="module")
def gpt2_like() -> PreTrainedTokenizerFast:
    return byte_level_bpe(digits="pairs")


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerFast:
    return sentencepiece_like()


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
    assert task.metric == "kl" and task.source["dataset"] == f"data{suffix}"


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
    with pytest.raises(TaskError, match="a file has no splits, so 'test' cannot be chosen"):
        load_task(write(tmp_path, ".jsonl", ROWS), gpt2_like, split="test")
    with pytest.raises(TaskError, match="so corruption 'abc' cannot be chosen"):
        load_task(write(tmp_path, ".jsonl", ROWS), gpt2_like, corruption="abc")


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


# ---------------------------------------------------------------- every way data can be wrong

GOOD = {"clean": "Then Alan", "corrupted": "Then Adam"}
GOOD_IDS = {"clean_ids": [1, 2], "corrupted_ids": [1, 3]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"clean": "Then Alan", "wrong": "x"}], "missing column corrupted; it needs clean and corrupted"),
        (
            [{"a": 1}],
            r"missing columns clean, corrupted; .* has a: columns \(--columns clean=NAME,...\) says",
        ),
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
        (_file("data.jsonl", b"[1, 2]\n"), "item 1: expected an object with named columns, found 1"),
        (_file("data.json", b'[{"clean": "a"}, 7]'), "item 2: expected an object"),
        (_file("data.json", b'[{"clean": "a"'), "not valid JSON"),
        (_file("data.jsonl", b"\xff\xfe\x00"), "cannot be read as text"),
        (_file("data.jsonl", b"\n\n"), "the dataset is empty"),
        (_file("data.json", b"[]"), "the dataset is empty"),
        (_file("data.csv", b"clean,corrupted\n"), "the dataset is empty"),
        (_file("data.csv", b""), "the dataset is empty"),
        (_file("data.csv", b"clean,corrupted\na,b,c\n"), "line 2: more cells than the header"),
        (_file("data.csv", b'clean,corrupted\n"a"x,b\n'), "line 2: not valid CSV"),
        (_file("data.parquet", b"PAR0"), "not a readable Parquet file"),
        (_file("data.txt", b"hello"), "cannot read .txt; use .jsonl, .json, .ndjson, .csv, .tsv, .parquet"),
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


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (("the", None), "1 of 2 examples have no answer (example 1, counted from 0)"),
        (("", "the"), "1 of 2 examples have no answer (example 0, counted from 0)"),
        (("", ""), "2 of 2 examples have no answer (example 0, 1, counted from 0)"),
        (
            ("the", "the", "", "", "", "", "the"),
            "4 of 7 examples have no answer (example 2, 3, 4, ..., counted",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_without_an_answer_are_told(
    rows: tuple[str | None, ...],
    said: str,
    suffix: str,
    tmp_path: Path,
    gpt2_like: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One is enough for accuracy to be agreement with the full model, which no figure says by itself."""
    written = []
    for answer in rows:
        row = {"clean": "When Aaron went", "corrupted": "When Adam went"}
        if answer is not None:
            row["answer"] = answer and f" {answer}"
        written.append(row)
    task = load_task(write(tmp_path, suffix, written), gpt2_like)
    assert not task.has_answers
    told = [record.getMessage() for record in caplog.records if "no answer" in record.getMessage()]
    assert len(told) == 1
    assert said in told[0]
    assert "accuracy is agreement with the full model" in told[0]


@pytest.mark.parametrize("answers", [(" the", " to"), None])
def test_data_with_all_answers_or_with_none_say_nothing(
    answers: tuple[str, str] | None,
    tmp_path: Path,
    gpt2_like: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows: list[dict[str, Any]] = [
        {"clean": "When Aaron went", "corrupted": "When Adam went"} for _ in range(2)
    ]
    for row, answer in zip(rows, answers or (), strict=False):
        row["answer"] = answer
    assert load_task(write(tmp_path, ".csv", rows), gpt2_like).has_answers == (answers is not None)
    assert not caplog.records
