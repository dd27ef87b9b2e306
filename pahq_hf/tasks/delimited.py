"""Rows of text with a delimiter: commas, tabs, semicolons."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from pahq_hf.errors import TaskError
from pahq_hf.tasks.names import known_role

Row = dict[str, Any]
_DELIMITERS = (",", ";", "\t", "|")


def delimited_rows(
    text: str, where: str, columns: Mapping[str, str], delimiter: str | None = None
) -> list[Row]:
    """Rows of a table whose first line names its columns. Every cell stays the text it is.

    Args:
        text: The table.
        where: The file, for messages.
        columns: Names of columns that stand for others.
        delimiter: What stands between cells; by default what makes most sense of the first line.

    Returns:
        The rows.

    Raises:
        TaskError: If it is no such table.
    """
    own = frozenset(columns.values())
    between = delimiter or _delimiter(text, own)
    # A field may be as long as a prompt; Python's own limit is 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=between)
    rows: list[Row] = []
    try:
        header = list(reader.fieldnames or ())
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise TaskError(f"{where}: column {twice!r:.60} is there twice")
        for row in reader:
            if None in row:
                raise TaskError(f"{where}, line {reader.line_num}: more cells than the header has columns")
            rows.append(dict(row))
    except csv.Error as error:
        raise TaskError(f"{where}, line {reader.reader.line_num}: not valid CSV: {error}") from error
    return rows


def _delimiter(text: str, own: frozenset[str]) -> str:
    """The delimiter under which the first line names most columns that are known, then most at all."""
    line = text.lstrip("\r\n").partition("\n")[0].rstrip("\r")

    def sense(delimiter: str) -> tuple[int, int]:
        try:
            names = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            return 0, 0
        return sum(name in own or known_role(name) is not None for name in names), len(names)

    return max(_DELIMITERS, key=sense)  # of equals the first, a comma
