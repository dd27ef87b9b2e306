"""Rows of a user's data from a file, a dataset folder or the Hub."""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pahq_hf.errors import TaskError

logger = logging.getLogger(__name__)

Row = dict[str, Any]
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Choice:
    """Which examples of a dataset are taken.

    Attributes:
        n: How many; all by default.
        offset: How many are passed over before.
        shuffle: Seed of the order they are put into first; None leaves them in their own.
    """

    n: int | None = None
    offset: int = 0
    shuffle: int | None = None

    def of(self, total: int) -> list[int]:
        """The numbers of the examples, of so many."""
        order = list(range(total))
        if self.shuffle is not None:
            random.Random(self.shuffle).shuffle(order)
        return order[self.offset :][: self.n]


@dataclass(frozen=True)
class Data:
    """Rows that were read.

    Attributes:
        rows: One dictionary per example.
        total: How many examples the whole dataset has.
    """

    rows: list[Row]
    total: int


def read_rows(source: str | Path, choice: Choice, *, split: str | None = None) -> Data:
    """Read the examples of a dataset.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, a local dataset folder or a Hub dataset id
            (`owner/name` or `owner/name:configuration`).
        choice: Which examples to take.
        split: Split to read; by default the only one, else `train`, else the first.

    Returns:
        The rows.

    Raises:
        TaskError: If the data is missing, malformed or empty, or the choice leaves nothing of it.
    """
    path = Path(source)
    if split is not None and path.is_file():
        raise TaskError(f"{source}: a file has no splits, so {split!r} cannot be chosen")
    if path.is_file():
        rows = _read_file(path)
        data = Data([rows[number] for number in choice.of(len(rows))], len(rows))
    else:
        data = _read_dataset(source, split, choice)
    if not data.total:
        raise TaskError(f"{source}: the dataset is empty; it needs at least one example")
    if not data.rows:
        raise TaskError(f"{source} has {data.total} examples; offset {choice.offset} leaves none of them")
    if choice.n is not None and len(data.rows) < choice.n:
        logger.warning(
            "%s: only %d of the %d examples asked for are there (%d in all%s)",
            source,
            len(data.rows),
            choice.n,
            data.total,
            f", {choice.offset} passed over" if choice.offset else "",
        )
    return data


def _read_file(path: Path) -> list[Row]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        return _read_json(path)
    if suffix == ".csv":
        return _read_csv(path)
    if suffix != ".parquet":
        found = suffix or "a file without extension"
        raise TaskError(f"{path}: cannot read {found}; use {', '.join(FILE_TYPES)}")
    from datasets import load_dataset

    # A throw-away cache: a file edited between two runs is never served from an older copy.
    with tempfile.TemporaryDirectory() as cache:
        try:
            data = load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache)
            return list(data.to_list())
        except Exception as error:  # datasets raises its readers' own exception types
            raise TaskError(f"{path}: not a readable Parquet file: {_reason(error)}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read as UTF-8 text: {error}") from error


# CSV and JSON are not read by Arrow, which wants one type per column and guesses it: the answer " 05" would
# become the number 5, the name "NA" a blank, and a string in one row and a list in another an error.


def _read_csv(path: Path) -> list[Row]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row:
                raise TaskError(f"{path}, line {reader.line_num}: more cells than the header has columns")
            rows.append(dict(row))
    except csv.Error as error:
        raise TaskError(f"{path}, line {reader.reader.line_num}: not valid CSV: {error}") from error
    return rows


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}: not valid JSON: {error}") from error
        where = "item"
    else:
        rows, where = [], "line"
        # split("\n"), not splitlines(): a JSON string may hold U+2028 and its like unescaped.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise TaskError(f"{path}, line {number}: not valid JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise TaskError(
                f"{path}, {where} {number}: expected an object with named columns, found {row!r:.60}"
            )
    return list(rows)


def _read_dataset(source: str | Path, split: str | None, choice: Choice) -> Data:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(source)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data: Any = load_from_disk(str(path))
        else:
            name, _, configuration = str(source).partition(":")
            whole = path.is_dir() or not configuration
            data = load_dataset(str(source)) if whole else load_dataset(name, configuration)
    except Exception as error:  # datasets, huggingface_hub and the network each raise their own
        kind = "dataset folder" if path.is_dir() else "dataset on the Hub"
        raise TaskError(f"{str(source)!r} could not be loaded as a {kind}: {_reason(error)}") from error
    if isinstance(data, DatasetDict):
        chosen = split or ("train" if "train" in data else next(iter(data), ""))
        if chosen not in data:
            raise TaskError(f"{source}: no split {chosen!r}; it has {', '.join(data) or 'none'}")
        data = data[chosen]
    elif split is not None:
        raise TaskError(f"{source}: the saved dataset has no splits, so {split!r} cannot be chosen")
    assert isinstance(data, Dataset)
    return Data(list(data.select(choice.of(len(data))).to_list()), len(data))


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: `datasets` wraps what really went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
