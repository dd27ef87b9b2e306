"""Rows of Python objects: a list of dictionaries, a DataFrame, a `datasets.Dataset`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pahq_hf.errors import TaskError, describe
from pahq_hf.tasks.choice import Choice, Data
from pahq_hf.tasks.json_shapes import Shapes

logger = logging.getLogger(__name__)

Given: TypeAlias = Any
"""What holds examples: rows, columns, a DataFrame, a `datasets.Dataset` or a `DatasetDict`."""

TOLD = "the given rows"  # in messages
_FRAME = ("pandas", "DataFrame")
_KINDS = (_FRAME, ("datasets", "Dataset"), ("datasets", "DatasetDict"))


def is_given(source: object) -> bool:
    """Whether an object holds examples itself, and is no name of them.

    Raises:
        TaskError: If it is a dataset that has no end that is known.
    """
    if any(_is_of(module, name, source) for module, name in _KINDS):
        return True
    if _is_of("datasets", "IterableDataset", source):
        raise TaskError(
            "a streamed dataset has no end that is known: take some of it first, list(dataset.take(1000))"
        )
    if isinstance(source, Mapping):
        return bool(source)
    if not isinstance(source, Sequence) or isinstance(source, (str, bytes)):
        return False
    return all(isinstance(row, Mapping) for row in source)


def given_rows(source: Given, choice: Choice, split: str | None, columns: Mapping[str, str]) -> Data:
    """Rows of an object.

    Args:
        source: The object.
        choice: Which examples to take.
        split: Which part of a `DatasetDict`, or of an object that holds several lists.
        columns: The data's names of columns by ours, where they are given.

    Returns:
        The rows, their cells as JSON has them.

    Raises:
        TaskError: If there is no such split, or no rows.
    """
    if _is_of("datasets", "DatasetDict", source):
        source, split = part_of(source, split, "the DatasetDict"), None
    if _is_of("datasets", "Dataset", source):
        _check_unsplit(split, source)
        numbers = choice.of(len(source))
        return Data([_plain_row(row) for row in source.select(numbers).to_list()], len(source))
    if _is_of(*_FRAME, source):
        _check_unsplit(split, source)
        rows = [_plain_row(row) for row in source.to_dict("records")]
    elif isinstance(source, Mapping):
        shapes = Shapes(TOLD, split, columns)
        rows = [_plain_row(row) for row in shapes.of_value(_plain(source))]
        if not shapes.has_split:
            _check_unsplit(split, source)
    else:
        _check_unsplit(split, source)
        rows = [_plain_row(row) for row in source]
    return Data([rows[number] for number in choice.of(len(rows))], len(rows))


def part_of(data: Any, split: str | None, where: str) -> Any:
    """One part of a dataset that has several: that which is asked for, else `train`, else the first.

    Raises:
        TaskError: If it is not there.
    """
    chosen = split or ("train" if "train" in data else next(iter(data), ""))
    if chosen not in data:
        raise TaskError(f"{where}: no split {chosen!r}; it has {', '.join(data) or 'none'}")
    if split is None and len(data) > 1:
        others = ", ".join(name for name in data if name != chosen)
        logger.warning(
            "%s: split %r is taken, and not %s: --split (split=...) chooses", where, chosen, others
        )
    return data[chosen]


def _is_of(module: str, name: str, source: object) -> bool:
    """Whether an object is of a library's class; one that was never imported has made no objects."""
    loaded = sys.modules.get(module)
    kind = None if loaded is None else vars(loaded).get(name)
    return isinstance(kind, type) and isinstance(source, kind)


def _check_unsplit(split: str | None, source: object) -> None:
    if split is not None:
        raise TaskError(f"a {type(source).__name__} has no splits, so {split!r} cannot be chosen")


def _plain_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise TaskError(f"{TOLD}: expected dictionaries with named columns, found {describe(row)}")
    return {str(name): _plain(cell) for name, cell in row.items()}


def _plain(cell: Any) -> Any:
    """A cell as JSON has it: NumPy's numbers and arrays as Python's, what is missing as None."""
    if hasattr(cell, "tolist"):  # NumPy's, pandas' and torch's
        cell = cell.tolist()
    if isinstance(cell, Mapping):
        return {str(name): _plain(item) for name, item in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_plain(item) for item in cell]
    if cell is None or isinstance(cell, (str, bool, int)):
        return cell
    if isinstance(cell, float):
        return None if cell != cell else int(cell) if cell.is_integer() else cell
    return None if type(cell).__name__ in ("NAType", "NaTType") else cell
