"""A crash-safe journal of a run: one JSON line per finished reader, after a header that pins the run.

Every line ends with a checksum of the file up to and with itself, so that one that was altered, lost or
moved is found, and what is wrong is never taken for what was measured. Journals of earlier versions have
none; what can be checked in them is whether their records could be those of a search at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.files import CIRCUIT_NAME, JOURNAL_NAME, write_text
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.config import ACDCConfig
from pahq_hf.errors import RunError
from pahq_hf.search.acdc import ReaderRecord, Search

logger = logging.getLogger(__name__)
_CHECK = re.compile(rb'(?:, )?"check": "([0-9a-f]{16})"\}$')
DATA = "data"  # where a header says what the prompts are, for people
_TOLD = 3  # differences
_ROUNDING = 1e-9  # of sums of metrics in double precision


class Journal:
    """Append-only record of a search in a run's folder.

    Args:
        folder: The run's folder.
        header: What pins the run: model, data and arguments.
        records: Finished readers in order.
        chain: Checksum of the lines on disk.
        size: Bytes of the lines on disk; what follows was not finished, and is overwritten.

    Attributes:
        is_sealed: Whether all lines had a checksum when the journal was opened.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        records: list[ReaderRecord],
        chain: Chain,
        size: int,
        *,
        is_sealed: bool = True,
    ) -> None:
        self.path = folder / JOURNAL_NAME
        self.header = dict(header)
        self.records = records
        self.is_sealed = is_sealed
        self._chain = chain
        self._size = size

    @classmethod
    def create(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """Start a new journal; its header is on disk when this returns.

        Raises:
            RunError: If the folder cannot be written.
        """
        chain = Chain()
        line = chain.seal(header)
        journal = cls(folder, header, [], chain, len(line))
        write_text(journal.path, line.decode())
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
            RunError: If the journal is of another run, damaged or unreadable.
        """
        journal = cls.read(folder)
        if journal is None:
            return cls.create(folder, header)
        check_header(journal.header, header, folder)
        try:
            os.truncate(journal.path, journal._size)  # also where no further record will do it
        except OSError as error:
            raise RunError(f"cannot repair {journal.path}: {error.strerror}") from error
        return journal

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """Read a journal and leave it as it is; None if not even its header was finished.

        Raises:
            RunError: If it is damaged or unreadable.
        """
        path = folder / JOURNAL_NAME
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from error
        lines = raw.split(b"\n")[:-1]  # what follows the last newline was not finished
        if not lines:
            return None
        chain, sealed = Chain(), True
        header: dict[str, Any] = {}
        records = []
        for number, line in enumerate(lines):
            what = f"record {number} on line {number + 1}" if number else "line 1, its header"
            try:
                sealed &= chain.verify(line)
                entry = json.loads(line)
                if number:
                    records.append(_record(entry))
                else:
                    header = dict(entry)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise _damaged(path, f"{what}: {error}") from error
        header.pop("check", None)
        size = sum(len(line) + 1 for line in lines)
        return cls(folder, header, records, chain, size, is_sealed=sealed)

    def check(
        self,
        graph: Graph,
        config: ACDCConfig,
        survivors: BoolArray | None = None,
        *,
        telescopes: bool = False,
    ) -> Search:
        """Check that the records are the first steps of this search.

        Each must be about the reader whose turn it is, with scores of just the edges that are tested there;
        an edge is kept where its score reaches the threshold and nowhere else.

        Args:
            graph: The graph.
            config: The search.
            survivors: Edges that are tested; all by default. [readers, writers]
            telescopes: Whether a reader's tests begin at the metric where the last one's ended, as in FP32.

        Returns:
            The state of the search after them.

        Raises:
            RunError: If not, naming the record.
        """
        state, order = Search.start(graph), graph.reader_order(config.order)
        chosen = graph.match_readers(config.readers)
        for number, record in enumerate(self.records, start=1):
            if number > len(order) or record.reader != order[number - 1]:
                raise _damaged(self.path, f"record {number}: its readers are not in the order of a search")
            reader = record.reader
            wrong = _inconsistency(record, state, config, bool(chosen[reader]), survivors)
            wrong = wrong or _jump(record, state, survivors, telescopes)
            if wrong is not None:
                name = graph.readers[reader].name
                raise _damaged(self.path, f"record {number} on line {number + 1}, reader {name}: {wrong}")
            state.apply(record)
        return state

    def append(self, record: ReaderRecord) -> None:
        """Add a finished reader; it is on disk when this returns.

        Raises:
            RunError: If the file cannot be written, for instance on a full disk.
        """
        chain = self._chain.copy()
        line = chain.seal(asdict(record) | {"scores": {str(w): s for w, s in record.scores.items()}})
        try:
            with self.path.open("r+b") as file:
                file.truncate(self._size)  # a torn last line
                file.seek(self._size)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}") from error
        self._chain, self._size = chain, self._size + len(line)
        self.records.append(record)


class Chain:
    """Checksums of JSON lines, each of all lines up to and with its own."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)
        self._is_begun = False

    def copy(self) -> Chain:
        """The same, to go on with independently."""
        other = Chain()
        other._digest, other._is_begun = self._digest.copy(), self._is_begun
        return other

    def seal(self, entry: Mapping[str, Any]) -> bytes:
        """The next line, with its checksum and its newline."""
        check = self._check(json.dumps(entry).encode())
        line = json.dumps({**entry, "check": check}).encode()
        self._digest.update(line + b"\n")
        return line + b"\n"

    def verify(self, line: bytes) -> bool:
        """Whether the next line has a checksum.

        Raises:
            ValueError: If it is wrong, or missing after lines that have one.
        """
        found = _CHECK.search(line)
        if found is None and self._is_begun:
            raise ValueError("it has no checksum")
        if found is not None and self._check(line[: found.start()] + b"}") != found[1].decode():
            raise ValueError("its checksum is not that of its text and of the lines before it")
        self._digest.update(line + b"\n")
        self._is_begun = found is not None
        return self._is_begun

    def _check(self, body: bytes) -> str:
        digest = self._digest.copy()
        digest.update(body)
        return digest.hexdigest()


def check_header(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Check that a folder's run is the one now asked for.

    Args:
        found: The run's header. What its `data` says of the prompts is not compared, only told; earlier
            versions have none.
        wanted: What it should be.
        folder: The run's folder.

    Raises:
        RunError: Saying how they differ.
    """
    for key, value in wanted.items():
        theirs, ours = found.get(key), json.loads(json.dumps(value))
        if key != DATA and ours != theirs:
            if key == "task":
                what = _other_prompts(found.get(DATA), json.loads(json.dumps(wanted.get(DATA))))
            else:
                what = _other(key, theirs, ours)
            raise RunError(f"{folder} holds another run: {what}; choose another folder")


def _other(key: str, theirs: object, ours: object) -> str:
    """How two values of a header differ, as who asks for them would say it."""
    if key == "model":
        return f"its model has other weights (fingerprint {_short(theirs)} there, {_short(ours)} now)"
    if isinstance(theirs, dict) and isinstance(ours, dict):
        name = next(name for name in (*ours, *theirs) if theirs.get(name) != ours.get(name))
        theirs, ours = theirs.get(name), ours.get(name)
        key = "precision" if name == "regime" else name
    return f"its {key.replace('_', ' ')} is {_short(theirs)} there, {_short(ours)} now"


def _other_prompts(theirs: object, ours: object) -> str:
    """How two tasks differ, by what is known of where their prompts came from."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [name for name in dict.fromkeys((*ours, *theirs)) if theirs.get(name) != ours.get(name)]
        if {"n", "examples"} <= set(names):
            names.remove("examples")
        if names:
            told = [
                f"{name} {_short(theirs.get(name))} there, {_short(ours.get(name))} now" for name in names
            ]
            return f"its prompts are others ({'; '.join(told[:_TOLD])})"
        return "its prompts are others: the data or the tokenizer changed"
    return "its prompts are others: another task, --n, --seed or data"


def check_result(state: Search, circuit: Circuit, folder: Path) -> None:
    """Check that a circuit is what a finished search found; of an unfinished one nothing can be said.

    Raises:
        RunError: If it is not.
    """
    if len(state.records) < len(state.graph.readers):
        return
    ours, theirs = (circuit.kept, circuit.scores, circuit.tested), (state.kept, state.scores, state.tested)
    if not all(map(np.array_equal, ours, theirs)):
        raise RunError(
            f"the circuit in {folder} is not the one its {JOURNAL_NAME} tells of: one of them was changed; "
            f"remove {CIRCUIT_NAME} and --resume to make it again from the journal"
        )


def _inconsistency(
    record: ReaderRecord, before: Search, config: ACDCConfig, chosen: bool, survivors: BoolArray | None
) -> str | None:
    """What is wrong with a record; None if it can be the next step of a search."""
    graph, reader = before.graph, record.reader
    edges = set(graph.in_edges(reader))
    if not edges.issuperset((*record.kept, *record.scores)):
        return f"reader {reader} has edges that do not exist"
    if record.searched is not chosen:
        return "it was searched, and is outside the search" if record.searched else "it was not searched"
    if not all(map(math.isfinite, (record.metric, *record.scores.values()))):
        return "a number in it is not finite"
    if not chosen:
        whole = record.kept == tuple(sorted(edges)) and not record.scores
        return None if whole else "it is outside the search, and does not keep all its edges untested"
    tested: set[int] = set()
    if graph.has_out_edge(before.kept, reader):
        tested = edges if survivors is None else {writer for writer in edges if survivors[reader, writer]}
    if tested != record.scores.keys():
        return f"it has scores of {len(record.scores)} edges; {len(tested)} are tested there"
    kept = {writer for writer, score in record.scores.items() if config.stays(score)}
    if tuple(sorted(kept)) != record.kept:
        return f"the edges it keeps are not those whose scores reach the threshold {config.threshold:g}"
    if not 0 <= record.changed <= record.looks or (record.looks and not config.margin):
        return f"{record.changed} of {record.looks} second looks changed a decision"
    return None


def _jump(record: ReaderRecord, before: Search, survivors: BoolArray | None, telescopes: bool) -> str | None:
    """What is wrong with a record's metric; None if nothing, or if it was measured afresh."""
    edges = list(before.graph.in_edges(record.reader))
    screened = survivors is not None and not survivors[record.reader, edges].all()
    if not before.records or (record.scores and (screened or record.looks or not telescopes)):
        return None
    expected = before.metric + sum(s for w, s in record.scores.items() if w not in record.kept)
    if abs(record.metric - expected) <= _ROUNDING * max(1.0, abs(expected)):
        return None
    return f"its metric is {record.metric!r}; the record before and its scores make it {expected!r}"


def _damaged(path: Path, reason: object) -> RunError:
    return RunError(
        f"{path} is damaged ({reason}); remove the folder and start anew, or cut the file before that line "
        "and --resume"
    )


def _short(value: object) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _record(entry: dict[str, Any]) -> ReaderRecord:
    kept, scores = entry["kept"], entry["scores"]
    counts = [entry["reader"], entry.get("looks", 0), entry.get("changed", 0), *kept]
    numbers = [entry["metric"], *scores.values()]
    # Python takes true for 1 and 3.7 for 3: an entry has to be what it says.
    if not isinstance(entry["searched"], bool) or any(type(count) is not int for count in counts):
        raise TypeError("a value is of another type")
    if any(type(number) not in (int, float) for number in numbers):
        raise TypeError("a number is none")
    return ReaderRecord(
        reader=entry["reader"],
        searched=entry["searched"],
        kept=tuple(kept),
        scores={int(w): float(s) for w, s in scores.items()},
        metric=float(entry["metric"]),
        looks=entry.get("looks", 0),
        changed=entry.get("changed", 0),
    )
