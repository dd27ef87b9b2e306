"""A crash-safe journal of a run: one JSON line per finished reader, after a header that pins the run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pahq_hf.acdc import ReaderRecord
from pahq_hf.config import Order
from pahq_hf.errors import RunError
from pahq_hf.files import JOURNAL_NAME, write_text
from pahq_hf.graph import Graph


class Journal:
    """Append-only record of a search in a run's folder.

    Args:
        folder: The run's folder.
        header: What pins the run: model, data, arguments, and the metric of the full model.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], records: list[ReaderRecord]) -> None:
        self.path = folder / JOURNAL_NAME
        self.header = dict(header)
        self.records = records

    @classmethod
    def create(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """Start a new journal; its header is on disk when this returns.

        Raises:
            RunError: If the folder cannot be written.
        """
        journal = cls(folder, header, [])
        write_text(journal.path, json.dumps(journal.header) + "\n")
        return journal

    @classmethod
    def resume(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """Open the journal of an interrupted run.

        A torn last line, from a crash while writing, is dropped.

        Args:
            folder: The run's folder.
            header: What the present call would write; must match.

        Returns:
            The journal with its finished readers.

        Raises:
            RunError: If the journal is of another run or unreadable.
        """
        path = folder / JOURNAL_NAME
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from error
        lines = raw.split(b"\n")
        whole = lines[:-1]  # what follows the last newline was not finished
        if not whole:
            return cls.create(folder, header)
        try:
            found = dict(json.loads(whole[0]))
            records = [_record(json.loads(line)) for line in whole[1:]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, error) from error
        check_header(found, header, folder)
        journal = cls(folder, found, records)
        if lines[-1]:
            _truncate(path, len(raw) - len(lines[-1]))
        return journal

    def check(self, graph: Graph, order: Order) -> None:
        """Check that the records are the first steps of a search of this graph.

        Raises:
            RunError: If not.
        """
        expected = graph.reader_order(order)[: len(self.records)]
        if [record.reader for record in self.records] != expected:
            raise _damaged(self.path, "its readers are not in the order of a search")
        for record in self.records:
            if not all(0 <= w < graph.prefix[record.reader] for w in (*record.kept, *record.scores)):
                raise _damaged(self.path, f"reader {record.reader} has edges that do not exist")

    def append(self, record: ReaderRecord) -> None:
        """Add a finished reader; it is on disk when this returns.

        Raises:
            RunError: If the file cannot be written, for instance on a full disk.
        """
        entry = asdict(record) | {"scores": {str(w): s for w, s in record.scores.items()}}
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}") from error
        self.records.append(record)


def check_header(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Check that a folder's run is the one now asked for.

    Raises:
        RunError: Naming the first difference.
    """
    for key, value in wanted.items():
        if json.loads(json.dumps(value)) != found.get(key):
            raise RunError(
                f"{folder} holds another run: its {key} is {_short(found.get(key))}, not {_short(value)}; "
                "choose another folder"
            )


def _damaged(path: Path, reason: object) -> RunError:
    return RunError(f"{path} is damaged ({reason}); remove the folder and start anew")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _record(entry: dict[str, Any]) -> ReaderRecord:
    return ReaderRecord(
        reader=int(entry["reader"]),
        searched=bool(entry["searched"]),
        kept=tuple(int(w) for w in entry["kept"]),
        scores={int(w): float(s) for w, s in entry["scores"].items()},
        metric=float(entry["metric"]),
        looks=int(entry.get("looks", 0)),
        changed=int(entry.get("changed", 0)),
    )


def _truncate(path: Path, size: int) -> None:
    try:
        os.truncate(path, size)
    except OSError as error:
        raise RunError(f"cannot repair {path}: {error.strerror}") from error
