"""Rows of a user's data from a file, a dataset folder, the Hub, or Python objects."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pahq_hf.errors import TaskError
from pahq_hf.tasks.choice import Choice, Data
from pahq_hf.tasks.formats import DataFile, file_rows, reason
from pahq_hf.tasks.given import TOLD, Given, given_rows, part_of

logger = logging.getLogger(__name__)

Source = str | Path | Given


def told_source(source: Source) -> str:
    """What data is called in messages."""
    return str(source) if isinstance(source, (str, Path)) else TOLD


def read_rows(
    source: Source, choice: Choice, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> Data:
    """Read the examples of a dataset.

    Args:
        source: A file of a type in `FILE_TYPES`, a local dataset folder, a Hub dataset id (`owner/name` or
            `owner/name:configuration`), or rows themselves.
        choice: Which examples to take.
        split: Split to read; by default the only one, else `train`, else the first.
        columns: The data's names of columns by ours, where they are given.

    Returns:
        The rows.

    Raises:
        TaskError: If the data is missing, malformed or empty, or the choice leaves nothing of it.
    """
    where = told_source(source)
    if not isinstance(source, (str, Path)):
        data = given_rows(source, choice, split, columns or {})
    elif os.path.isfile(source):
        rows = file_rows(DataFile(Path(source), columns or {}, split))
        data = Data([rows[number] for number in choice.of(len(rows))], len(rows))
    else:
        data = _read_dataset(source, split, choice)
    if not data.total:
        raise TaskError(f"{where}: the dataset is empty; it needs at least one example")
    if not data.rows:
        raise TaskError(f"{where} has {data.total} examples; offset {choice.offset} leaves none of them")
    if choice.n is not None and len(data.rows) < choice.n:
        logger.warning(
            "%s: only %d of the %d examples asked for are there (%d in all%s)",
            where,
            len(data.rows),
            choice.n,
            data.total,
            f", {choice.offset} passed over" if choice.offset else "",
        )
    return data


def _read_dataset(source: str | Path, split: str | None, choice: Choice) -> Data:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(source)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data: Any = load_from_disk(str(path))
        else:
            name, _, configuration = str(source).partition(":")
            whole = os.path.isdir(path) or not configuration
            data = load_dataset(str(source)) if whole else load_dataset(name, configuration)
    except Exception as error:  # datasets, huggingface_hub and the network each raise their own
        kind = "dataset folder" if os.path.isdir(path) else "dataset on the Hub"
        raise TaskError(f"{str(source)!r} could not be loaded as a {kind}: {reason(error)}") from error
    if isinstance(data, DatasetDict):
        data = part_of(data, split, str(source))
    elif split is not None:
        raise TaskError(f"{source}: the saved dataset has no splits, so {split!r} cannot be chosen")
    assert isinstance(data, Dataset)
    return Data(list(data.select(choice.of(len(data))).to_list()), len(data))
