"""Formats of data files: one table, by the end of a file's name.

Another format is a function from a `DataFile` to rows, and a row of `_FORMATS`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pahq_hf.errors import TaskError
from pahq_hf.tasks.delimited import delimited_rows
from pahq_hf.tasks.json_shapes import Shapes
from pahq_hf.tasks.text_files import read_text

Row = dict[str, Any]
_PACKED = ".gz"


@dataclass(frozen=True)
class DataFile:
    """A file of examples.

    Attributes:
        path: Where it is.
        columns: The data's names of columns by ours, where they are given.
        split: Which of several lists is asked for.
    """

    path: Path
    columns: Mapping[str, str]
    split: str | None = None

    @property
    def where(self) -> str:
        """What the file is called in messages."""
        return str(self.path)


# CSV and JSON are not read by Arrow, which wants one type per column and guesses it: the answer " 05" would
# become the number 5, the name "NA" a blank, and a string in one row and a list in another an error.


def _json(file: DataFile) -> list[Row]:
    shapes = Shapes(file.where, file.split, file.columns)
    rows = shapes.of_text(read_text(file.path))
    if not shapes.has_split:
        _check_unsplit(file)
    return rows


def _csv(file: DataFile) -> list[Row]:
    _check_unsplit(file)
    return delimited_rows(read_text(file.path), file.where, file.columns)


def _tsv(file: DataFile) -> list[Row]:
    _check_unsplit(file)
    return delimited_rows(read_text(file.path), file.where, file.columns, "\t")


def _parquet(file: DataFile) -> list[Row]:
    from datasets import load_dataset

    _check_unsplit(file)
    # A throw-away cache: a file edited between two runs is never served from an older copy.
    with tempfile.TemporaryDirectory() as cache:
        try:
            data = load_dataset("parquet", data_files=str(file.path), split="train", cache_dir=cache)
            return list(data.to_list())
        except Exception as error:  # datasets raises its readers' own exception types
            raise TaskError(f"{file.path}: not a readable Parquet file: {reason(error)}") from error


_FORMATS: dict[str, Callable[[DataFile], list[Row]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".ndjson": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
FILE_TYPES = tuple(_FORMATS)


def file_type(path: Path) -> str:
    """The end of a file's name that tells its format, without that of packed files."""
    return Path(path.stem if path.suffix.lower() == _PACKED else path.name).suffix.lower()


def file_rows(file: DataFile) -> list[Row]:
    """Rows of a file.

    Raises:
        TaskError: If the format is not known, or the file cannot be read.
    """
    suffix = file_type(file.path)
    if suffix not in _FORMATS:
        found = suffix or "a file without extension"
        raise TaskError(
            f"{file.path}: cannot read {found}; use {', '.join(FILE_TYPES)}, also packed as {_PACKED}"
        )
    return _FORMATS[suffix](file)


def _check_unsplit(file: DataFile) -> None:
    if file.split is not None:
        raise TaskError(f"{file.path}: a file has no splits, so {file.split!r} cannot be chosen")


def reason(error: BaseException) -> str:
    """The first line of the innermost cause: `datasets` wraps what really went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
