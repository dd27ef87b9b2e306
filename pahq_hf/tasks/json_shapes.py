"""Rows of JSON in the shapes that people's programs write.

- a list of objects; an object a line, or over several lines, one after the other;
- an object that holds a list of objects somewhere (AutoCircuit's `prompts`);
- pandas' `to_json`: columns of cells by row, or of lists; rows by their index; `columns` and `data`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pahq_hf.errors import TaskError, first_line
from pahq_hf.tasks.names import is_ids, known_role

Row = dict[str, Any]
_DEEPEST = 6  # an object inside an object inside ..., before rows
_SHOWN = 5


class Shapes:
    """Reads rows out of JSON values.

    Args:
        where: The file, for messages.
        split: Name of one of several lists.
        columns: Names of columns that stand for others.
    """

    def __init__(self, where: str, split: str | None, columns: Mapping[str, str]) -> None:
        self._where = where
        self._split = split
        self._own = frozenset(columns.values())
        self.has_split = False

    def of_text(self, text: str) -> list[Row]:
        """Rows of a file's text: of one value, or of several one after the other.

        Raises:
            TaskError: If it is no JSON, or holds no rows.
        """
        values = list(self._values(text))
        if len(values) == 1:
            return self.of_value(values[0][1])
        return [self._row(value, f"line {line}") for line, value in values]

    def of_value(self, value: Any) -> list[Row]:
        """Rows of one value.

        Raises:
            TaskError: If it holds none.
        """
        if isinstance(value, list):
            return [self._row(item, f"item {number}") for number, item in enumerate(value, 1)]
        if not isinstance(value, dict):
            self._row(value, "line 1")
        if self._is_row(value) and (self._is_pair(value) or not any(_lists(value, "", _DEEPEST))):
            return [value]
        listed, data = value.get("columns"), value.get("data")
        if isinstance(listed, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
            return [dict(zip(map(str, listed), row, strict=False)) for row in data]
        if any(self._is_known(name) and isinstance(cell, list | dict) for name, cell in value.items()):
            return self._of_columns(value)
        items = list(value.values())
        if items and all(isinstance(item, dict) and self._is_row(item) for item in items):
            return items
        return self._of_lists(value)

    def _values(self, text: str) -> Iterator[tuple[int, Any]]:
        """JSON values one after the other, each with the line it begins in."""
        decoder, at, line = json.JSONDecoder(), 0, 1
        while True:
            start = at
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
            if at == len(text):
                return
            line += text.count("\n", start, at)
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                place = f"column {error.colno}" if error.lineno == line else f"line {error.lineno}"
                raise TaskError(
                    f"{self._where}, line {line}: not valid JSON: {error.msg} in {place}"
                ) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or depth
                raise TaskError(
                    f"{self._where}, line {line}: not usable JSON: {first_line(error)}"
                ) from error
            yield line, value
            line += text.count("\n", at, end)
            at = end

    def _row(self, value: Any, which: str) -> Row:
        if not isinstance(value, dict):
            raise TaskError(
                f"{self._where}, {which}: expected an object with named columns, found {value!r:.60}"
            )
        return value

    def _is_known(self, name: str) -> bool:
        return name in self._own or known_role(name) is not None

    def _is_row(self, value: Mapping[str, Any]) -> bool:
        """Whether an object is one example, not a column of them: some cell that has to be there is one."""
        for name, cell in value.items():
            if not (self._is_known(name) or name == "prompt"):
                continue
            if isinstance(cell, str) or _is_chat(cell):
                return True
            if is_ids(name) and isinstance(cell, list) and not any(isinstance(item, list) for item in cell):
                return True
        return False

    def _is_pair(self, value: Mapping[str, Any]) -> bool:
        """Whether an object names what a pair of prompts is made of, and not only what others name too."""
        if self._own & value.keys() or "prompt" in value:
            return True
        roles = {known_role(name) for name in value}
        return {"clean", "corrupted"} <= roles or {"clean_ids", "corrupted_ids"} <= roles

    def _of_columns(self, value: Mapping[str, Any]) -> list[Row]:
        """Rows of columns, each a list or an object of cells by row."""
        columns = {name: cells for name, cells in value.items() if isinstance(cells, list | dict)}
        if not columns:
            return [dict(value)]
        sizes = {name: len(cells) for name, cells in columns.items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size}" for name, size in list(sizes.items())[:_SHOWN])
            raise TaskError(f"{self._where}: its columns are not of one length: {told}")
        if all(isinstance(cells, list) for cells in columns.values()):
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        tables = {
            name: cells if isinstance(cells, dict) else dict(enumerate(cells))
            for name, cells in columns.items()
        }
        order = list(next(iter(tables.values())))
        for name, cells in tables.items():
            if set(cells) != set(order):
                raise TaskError(f"{self._where}: column {name} has other rows than the first column")
        return [{name: cells[key] for name, cells in tables.items()} for key in order]

    def _of_lists(self, value: Mapping[str, Any]) -> list[Row]:
        """Rows of the list of objects that an object holds; the object itself is one if there is none."""
        found = dict(_lists(value, "", _DEEPEST))
        if self._split is not None and found:
            named = {
                path: rows for path, rows in found.items() if self._split in (path, path.rpartition(".")[2])
            }
            if len(named) != 1:
                raise TaskError(f"{self._where}: no list {self._split!r}; it has {_names(found)}")
            found, self.has_split = named, True
        if len(found) > 1:
            likely = {path: rows for path, rows in found.items() if self._is_row(rows[0])}
            found = likely or found
        if len(found) > 1:
            raise TaskError(
                f"{self._where}: it holds several lists of examples, {_names(found)}: choose one with "
                "--split (split=...)"
            )
        if not found:
            return [dict(value)] if value else []
        path, rows = next(iter(found.items()))
        return [self._row(row, f"{path}, item {number}") for number, row in enumerate(rows, 1)]


def _lists(value: Mapping[str, Any], path: str, deepest: int) -> Iterator[tuple[str, list[Any]]]:
    """Lists of objects inside an object, by where they are."""
    for name, item in value.items():
        here = f"{path}.{name}" if path else name
        if isinstance(item, list) and item and isinstance(item[0], dict):
            yield here, item
        elif isinstance(item, dict) and deepest:
            yield from _lists(item, here, deepest - 1)


def _is_chat(cell: Any) -> bool:
    return (
        isinstance(cell, list)
        and bool(cell)
        and all(isinstance(item, dict) and "role" in item for item in cell)
    )


def _names(found: Mapping[str, Any]) -> str:
    shown = [f"{name:.40}" for name in list(found)[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
