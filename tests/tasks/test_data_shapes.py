"""Files and objects in the shapes that this field's programs, pandas and spreadsheets write."""

from __future__ import annotations

import gzip
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from pahq_hf.errors import TaskError
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.loading import load_task
from tests.task_tokenizers import byte_level_bpe, one_line, text

ROWS: list[dict[str, Any]] = [
    {"clean": "When Aaron went", "corrupted": "When Adam went", "answer": " to", "distractor": " the"},
    {"clean": "Then Alan", "corrupted": "Then Amy", "answer": " went", "distractor": " to"},
]
AUTO_CIRCUIT = [
    {
        "clean": row["clean"],
        "corrupt": row["corrupted"],
        "answers": [row["answer"]],
        "wrong_answers": [row["distractor"]],
    }
    for row in ROWS
]
FRAME = pandas.DataFrame(ROWS)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_bpe(digits="pairs")


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def said(task: Task, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """A task as rows of text."""
    return [
        {
            "clean": text(task, i, tokenizer),
            "corrupted": text(task, i, tokenizer, corrupted=True),
            "answer": "".join(tokenizer.decode([token]) for token in task.answers[i]),
            "distractor": "".join(tokenizer.decode([token]) for token in task.distractors[i]),
        }
        for i in range(len(task))
    ]


def renamed(*names: str) -> list[dict[str, Any]]:
    return [dict(zip(names, row.values(), strict=True)) for row in ROWS]


def lines(rows: list[dict[str, Any]], indent: int | None = None) -> str:
    return "\n".join(json.dumps(row, indent=indent) for row in rows)


def table(header: str, between: str = ",") -> str:
    return "\n".join([header, *(between.join(row.values()) for row in ROWS)]) + "\n"


FEATURE = renamed("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
FILES: dict[str, tuple[str, str]] = {
    "an array": ("a.json", json.dumps(ROWS, indent=2)),
    "AutoCircuit": ("a.json", json.dumps({"prompts": AUTO_CIRCUIT}, indent=4)),
    "nested": ("a.json", json.dumps({"meta": {"seed": [1]}, "data": {"v": 1, "prompts": AUTO_CIRCUIT}})),
    "beside others": ("a.json", json.dumps({"vocabulary": [{"id": 1}], "examples": ROWS})),
    "below a title": ("a.json", json.dumps({"prefix": "ioi", "year": 2024, "answer": "x", "prompts": ROWS})),
    "pandas columns": ("a.json", FRAME.to_json()),
    "pandas index": ("a.json", FRAME.to_json(orient="index")),
    "pandas split": ("a.json", FRAME.to_json(orient="split")),
    "pandas table": ("a.json", FRAME.to_json(orient="table")),
    "pandas records": ("a.json", FRAME.to_json(orient="records")),
    "pandas lines": ("a.json", FRAME.to_json(orient="records", lines=True)),
    "columns of lists": ("a.json", json.dumps(FRAME.to_dict("list"))),
    "over several lines": ("a.jsonl", lines(ROWS, indent=2)),
    "ndjson": ("a.ndjson", lines(ROWS)),
    "feature circuits": ("a.json", lines(FEATURE)),
    "other case": ("a.csv", table("Clean,Corrupted,Answer,Distractor")),
    "semicolons": ("a.csv", table("clean;corrupted;answer;distractor", ";")),
    "tabs": ("a.tsv", table("clean\tcorrupted\tanswer\tdistractor", "\t")),
    "tabs in a .csv": ("a.csv", table("clean\tcorrupted\tanswer\tdistractor", "\t")),
    "pandas CSV": ("a.csv", FRAME.to_csv()),
}


@pytest.mark.parametrize("shape", FILES)
@pytest.mark.parametrize("pack", [False, True])
def test_every_shape_gives_the_same_rows(
    shape: str, pack: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    name, content = FILES[shape]
    path = tmp_path / (f"{name}.gz" if pack else name)
    path.write_bytes(gzip.compress(content.encode()) if pack else content.encode())
    task = load_task(path, tokenizer)
    assert said(task, tokenizer) == ROWS
    assert task.name == "a" and task.source["dataset"] == path.name and task.source["total"] == 2


OBJECTS: dict[str, Callable[[], Any]] = {
    "rows": lambda: ROWS,
    "a tuple": lambda: tuple(ROWS),
    "columns": lambda: FRAME.to_dict("list"),
    "DataFrame": lambda: FRAME,
    "DataFrame of lists": lambda: pandas.DataFrame([row | {"answer": [row["answer"]]} for row in ROWS]),
    "Dataset": lambda: Dataset.from_list(ROWS),
    "DatasetDict": lambda: DatasetDict(test=Dataset.from_list(ROWS)),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_python_objects_are_data_as_they_are(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(OBJECTS[kind](), tokenizer)
    assert said(task, tokenizer) == ROWS
    assert task.name == "data" and task.source["dataset"] == type(OBJECTS[kind]()).__name__
    last = load_task(OBJECTS[kind](), tokenizer, offset=1)
    assert said(last, tokenizer) == ROWS[1:]
    assert len(load_task(OBJECTS[kind](), tokenizer, n=1, shuffle=True, seed=3)) == 1


def test_a_frame_with_gaps_and_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    """Pandas makes floats of numbers beside gaps, and NaN of what is missing."""
    frame = pandas.DataFrame(
        {"clean_ids": [[1, 2], [3, 4]], "corrupted_ids": [[1, 5], [3, 6]], "answer_ids": [7, None]}
    )
    assert load_task(frame).answers == ((7,), ())
    frame = pandas.DataFrame([ROWS[0], ROWS[1] | {"distractor": None}])
    assert [len(wrong) for wrong in load_task(frame, tokenizer).distractors] == [1, 0]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (Dataset.from_list(ROWS), {"split": "test"}, "a Dataset has no splits, so 'test'"),
        (DatasetDict(dev=Dataset.from_list(ROWS)), {"split": "test"}, "no split 'test'; it has dev"),
        (FRAME, {"split": "test"}, "a DataFrame has no splits"),
        (ROWS, {"split": "test"}, "a list has no splits"),
        (ROWS, {"seed": 1}, "the given rows: data is taken in its own order"),
        (FRAME.iloc[:0], {}, "the given rows: the dataset is empty"),
        (Dataset.from_list(ROWS).to_iterable_dataset(), {}, "streamed dataset .* take some of it first"),
    ],
)
def test_objects_that_cannot_be_used(
    given: Any, options: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(TaskError, match=message) as error:
        load_task(given, tokenizer, **options)
    one_line(error)


def test_rows_need_no_pandas(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("pandas", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert said(load_task(ROWS, tokenizer), tokenizer) == ROWS
    with pytest.raises(TaskError, match="got int"):
        load_task(5, tokenizer)


# -- text that is not in UTF-8 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "prompts", "guess"),
    [
        ("utf-8-sig", ("Aaron à côté", "Adam à côté"), None),
        ("utf-16", ("Aaron à côté", "Adam à côté"), None),
        ("cp1252", ("Aaron à côté", "Adam à côté"), "cp1252"),
        ("cp1252", ("“Aaron” – Zoë’s", "“Adam” – Zoë’s"), "cp1252"),
        ("cp1251", ("Иван пошёл в магазин", "Пётр пошёл в магазин"), "cp1251"),
        ("shift_jis", ("猫はどこですか", "犬はどこですか"), "cp932"),
    ],
)
def test_encodings(
    encoding: str,
    prompts: tuple[str, str],
    guess: str | None,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(f"clean,corrupted,answer\n{','.join(prompts)}, to\n".encode(encoding))
    # Letters of other alphabets are several bytes, of which these names have different numbers.
    task = load_task(path, tokenizer, on_mismatch="pad")
    assert text(task, 0, tokenizer) == prompts[0]
    told = [message for message in messages_of(caplog) if "a guess" in message]
    assert len(told) == (guess is not None)
    assert guess is None or f"is read as {guess}, which is a guess" in told[0]


# -- names of columns --------------------------------------------------------------------------------------


def test_names_of_other_programs_are_told_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "simple.json"
    path.write_text(lines([row | {"case": "singular"} for row in FEATURE]))
    load_task(path, tokenizer)
    names, unused = messages_of(caplog)
    assert "clean_prefix, patch_prefix, clean_answer, patch_answer are read as clean, corrupted," in names
    assert unused.endswith("columns that are not used: case")
    caplog.clear()
    path.write_text(lines([{name.upper(): cell for name, cell in row.items()} for row in ROWS]))
    load_task(path, tokenizer)
    assert not messages_of(caplog)  # another case is the same name


def test_columns_map_the_rest(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    mapping = {"clean": "Q", "corrupted": "X", "answer": "A", "distractor": "B"}
    rows = renamed("Q", "x", "A", "B")
    path = tmp_path / "data.json"
    for content in (rows, {"Q and A": rows}, pandas.DataFrame(rows).to_dict("list")):
        path.write_text(json.dumps(content))
        task = load_task(path, tokenizer, columns=mapping)
        assert said(task, tokenizer) == ROWS
    assert task.source["columns_of"] == mapping
    # what is named wins over what is called so
    swapped = load_task(ROWS, tokenizer, columns={"clean": "corrupted", "corrupted": "clean"})
    assert text(swapped, 0, tokenizer) == ROWS[0]["corrupted"]
    assert text(swapped, 0, tokenizer, corrupted=True) == ROWS[0]["clean"]
    own = [row | {"Q": "Then Anna"} for row in ROWS]
    assert text(load_task(own, tokenizer, columns={"clean": "Q"}, n=1, offset=1), 0, tokenizer) == "Then Anna"
    with pytest.raises(TaskError, match="no column 'Answr' for answer: did you mean 'answer'"):
        load_task(ROWS, tokenizer, columns={"answer": "Answr"})


def test_eap_ig_token_ids_beside_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Its IOI file begins with pandas' unnamed column of row numbers."""
    to, the = (tokenizer.convert_tokens_to_ids(token) for token in ("Ġto", "Ġthe"))
    path = tmp_path / "ioi.csv"
    path.write_text(
        ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n"
        f'470,"When Aaron went","When Adam went","When Alan went",{to},{the}\n'
    )
    task = load_task(path, tokenizer)
    assert (task.answers, task.distractors) == (((to,),), ((the,),))
    assert [message.rpartition(": ")[2] for message in messages_of(caplog)] == [
        "correct_idx and incorrect_idx are read as token ids of answers and distractors, ' to' and ' the' in "
        "the first row",
        "corrupted_hard",
    ]


WAR = "The war lasted from the year 17{:02d} to the year 17"


def years(column: str, *values: object) -> list[dict[str, Any]]:
    return [
        {"clean": WAR.format(int(str(value)[-2:])), "corrupted": WAR.format(1), column: value}
        for value in values
    ]


@pytest.mark.parametrize(
    "rows",
    [
        years("year", "1733", "1705"),  # MIB
        years("year", 1733, 1705),
        years("label", 33, 5),  # EAP-IG
        years("label", "33", "5"),
        years("correct_idx", "33", "05"),
        years("digits", 33, 5),  # Edge Pruning
    ],
)
def test_years_have_the_answers_of_the_tokenizer(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    task = load_task(rows, tokenizer)
    one = tokenizer.convert_tokens_to_ids
    assert task.answers[0] == tuple(one(f"{year}") for year in range(34, 100))
    assert task.distractors[0] == tuple(one(f"{year:02d}") for year in range(34))
    assert task.answers[1][0] == one("06") and len(task.answers[1]) == 94
    digits = byte_level_bpe(digits="single")
    by_digit = load_task(rows[:1], digits)
    assert [digits.decode([token]) for token in by_digit.answers[0]] == list("456789")
    assert [digits.decode([token]) for token in by_digit.distractors[0]] == list("012")
    assert not messages_of(caplog)
    # kl needs no answers
    assert not load_task(rows, byte_level_bpe(digits="triples")).has_answers
    assert "need a tokenizer that splits years into two two-digit tokens" in messages_of(caplog)[0]
    assert "columns that are not used: " in messages_of(caplog)[1]


def test_rows_whose_year_tells_nothing_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    good = years("year", "1733", "1707", "1757")
    for bad, message in (
        (years("year", "1799"), "example 3: no later year than 99"),
        (years("year", "1744"), "example 3: the tokenizer does not split the year"),  # one token here
        ([{**good[0], "year": "1734"}], "example 3: year '1734' is not the year of the clean prompt"),
    ):
        with pytest.raises(TaskError, match=message):
            load_task([*good, *bad], tokenizer)
        assert len(load_task([*good, *bad], tokenizer, on_mismatch="skip")) == 3
    # a column that merely is called so is not one
    assert not load_task([row | {"year": 1999} for row in ROWS], tokenizer).source.get("skipped")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prefix": "Then Alan", "corr_prefix": "Then Amy", "pronoun": "she", "corr_pronoun": "he"},
            ("Then Alan", "Then Amy", " she", " he"),
        ),
        (
            {"prefix": "Then Alan", "corr_prefix": "Then Amy", "pronoun": "she", "corr_pronoun": "she"},
            ("Then Alan", "Then Amy", " she", ""),
        ),
        (
            {"ioi_sentences": "Then Alan went to the", "corr_ioi_sentences": "Then Amy went to Anna"},
            ("Then Alan went to", "Then Amy went to", " the", ""),
        ),
        (
            {"clean": "Then Alan <predict>went</predict>", "corrupted": "Then Amy <predict>gave</predict>"},
            ("Then Alan", "Then Amy", " went", ""),
        ),
        (
            {"clean": "Then Alan<predict> went</predict> to", "corrupted": "Then Amy"},
            ("Then Alan", "Then Amy", " went", ""),
        ),
    ],
)
def test_edge_pruning(
    row: dict[str, Any], expected: tuple[str, ...], tokenizer: PreTrainedTokenizerFast
) -> None:
    (found,) = said(load_task([row], tokenizer), tokenizer)
    assert tuple(found.values()) == expected


# -- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"train": [{"clean": "a"}], "test": [{"clean": "b"}]}', "train, test: choose one with"),
        ("a.json", b'{"a": 1}', "missing columns clean, corrupted; .* has a"),
        ("a.json", b'{"clean": ["a", "b"], "corrupted": ["c"]}', "clean has 2, corrupted has 1"),
        ("a.json", b'{"clean": {"0": "a"}, "corrupted": {"1": "c"}}', "column corrupted has other rows"),
        ("a.json", b'{"prompts": [{"clean": "a"}, 3]}', "prompts, item 2: expected an object"),
        ("a.json", b'"text"', "line 1: expected an object"),
        ("a.jsonl", b'{"clean": "a"}\n{"clean": \n}\n', "line 2: not valid JSON: .* in line 3"),
        ("a.jsonl", b'{"clean": "a"} 7', "line 1: expected an object with named columns, found 7"),
        ("a.json", b"[" * 10**5, "not usable JSON|not valid JSON"),
        ("a.json", b'[{"clean": ' + b"9" * 5000 + b"}]", "not usable JSON"),
        ("a.csv", b"clean,clean\na,b\n", "column 'clean' is there twice"),
        ("a.csv.gz", gzip.compress(b"clean,corrupted\n" * 99)[:30], "cannot be read"),
        ("a.txt.gz", gzip.compress(b"hello"), "cannot read .txt; use .jsonl, .json, .ndjson, .csv"),
        ("a.csv", b"\x00\x81\xff\x00", "cannot be read as text"),
        ("a.json", b'[{"clean": [1, 2], "corrupted": [1, 3]}]', "token ids are of a column clean_ids"),
        (
            "a.json",
            b'[{"clean": "Then Alan", "corrupted": "Then Amy", "answer": [5]}]',
            r"found 5 \(token ids are of a column answer_ids\)",
        ),
    ],
)
def test_files_that_cannot_be_used(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TaskError, match=message) as error:
        load_task(path, tokenizer)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"clean": "Then \ud800"}, r"column clean holds '\\ud800', which is half of a character"),
        ({"corrupted": [{"role": "user", "content": "\udfff"}]}, r"column corrupted holds '\\udfff'"),
        ({"answer": " t\ud800"}, r"column answer holds '\\ud800'"),
        (
            {"clean_ids": [2**63, 1], "corrupted_ids": [1, 1]},
            "token id 9223372036854775808 in column clean_ids",
        ),
        (
            {"clean_ids": [1, 2], "corrupted_ids": [1, 10**400]},
            "token id of more than 64 bits in column corr",
        ),
    ],
)
def test_cells_that_no_tokenizer_reads(
    row: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    chatty = byte_level_bpe(digits="pairs")
    chatty.chat_template = "{{ messages[0]['content'] }}"
    ids = "clean_ids" in row
    with pytest.raises(TaskError, match=message) as error:
        load_task([ROWS[0] | row], None if ids else chatty, chat_template=not ids)
    one_line(error)


def test_a_list_of_several_is_chosen(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": {"train": ROWS[:1], "test": ROWS[1:]}}))
    assert said(load_task(path, tokenizer, split="test"), tokenizer) == ROWS[1:]
    assert said(load_task(path, tokenizer, split="data.train"), tokenizer) == ROWS[:1]
    with pytest.raises(TaskError, match=r"no list 'dev'; it has data\.train, data\.test"):
        load_task(path, tokenizer, split="dev")
