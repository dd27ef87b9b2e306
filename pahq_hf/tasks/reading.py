"""Rows of a user's data from a file, a dataset folder or the Hub."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from pahq_hf.errors import TaskError

Row = dict[str, Any]
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(source: str | Path, *, split: str | None = None, n: int | None = None) -> list[Row]:
    """Read the examples of a dataset.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, a local dataset folder or a Hub dataset id
            (`owner/name` or `owner/name:configuration`).
        split: Split to read; by default the only one, else `train`, else the first.
        n: Read at most this many rows from the start.

    Returns:
        One dictionary per row.

    Raises:
        TaskError: If the data is missing, malformed or empty.
    """
    path = Path(source)
    if split is not None and path.is_file():
        raise TaskError(f"{source}: a file has no splits, so {split!r} cannot be chosen")
    rows = _read_file(path) if path.is_file() else _read_dataset(source, split, n)
    if not rows:
        raise TaskError(f"{source}: the dataset is empty; it needs at least one example")
    return rows if n is None else rows[:n]


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


def _read_dataset(source: str | Path, split: str | None, n: int | None) -> list[Row]:
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
    if n is not None:
        data = data.select(range(min(n, len(data))))
    return list(data.to_list())


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: `datasets` wraps what really went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
