"""A crash-safe journal of a run: one JSON line per step of its search, after a header that pins the run.

Every line ends with a checksum of the file up to and with itself, so that one that was altered, lost or
moved is found, and what is wrong is never taken for what was measured. Journals of earlier versions have
none; what can be checked in them is whether their records could be those of a search at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.files import CIRCUIT_NAME, DISCOVERY_NAME, JOURNAL_NAME, write_text
from pahq_hf.circuit.json_reader import OWN_BYTES, check_regular, parse_json, read_json, read_regular
from pahq_hf.errors import CircuitError, RunError
from pahq_hf.search.kind import FIRST

_CHECK = re.compile(rb'(?:, )?"check": "([0-9a-f]{16})"\}$')
DATA = "data"  # where a header says what the prompts are, for people
_EVERY_SEARCH = ("model", "task", "dtype", "precision", "policy_order", DATA, "settings", "check")
_FOLLOWS = ("margin",)  # options whose values follow from others unless they are given
_TOLD = 3  # differences
Step = Mapping[str, Any]


class Journal:
    """Append-only record of a search in a run's folder.

    Args:
        folder: The run's folder.
        header: What pins the run: model, data and arguments.
        steps: Steps of the search so far, in order.
        chain: Checksum of the lines on disk.
        size: Bytes of the lines on disk; what follows was not finished, and is overwritten.

    Attributes:
        is_sealed: Whether all lines had a checksum when the journal was opened.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        steps: list[Step],
        chain: Chain,
        size: int,
        *,
        is_sealed: bool = True,
    ) -> None:
        self.path = folder / JOURNAL_NAME
        self.header = dict(header)
        self.steps = steps
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
            The journal with its steps so far.

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
            raw = read_regular(path, OWN_BYTES)
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from error
        lines = raw.split(b"\n")[:-1]  # what follows the last newline was not finished
        if not lines:
            return None
        chain, sealed = Chain(), True
        header: dict[str, Any] = {}
        steps: list[Step] = []
        for number, line in enumerate(lines):
            what = f"record {number} on line {number + 1}" if number else "line 1, its header"
            try:
                sealed &= chain.verify(line)
                entry = parse_json(line)
                if number:
                    steps.append(_step(entry))
                else:
                    header = dict(entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise damaged(path, f"{what}: {error}") from error
        header.pop("check", None)
        size = sum(len(line) + 1 for line in lines)
        return cls(folder, header, steps, chain, size, is_sealed=sealed)

    def append(self, step: Mapping[str, Any]) -> None:
        """Add a step; it is on disk when this returns.

        Raises:
            RunError: If the file cannot be written, for instance on a full disk.
        """
        chain = self._chain.copy()
        line = chain.seal(step)
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
        self.steps.append(step)


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


def is_begun(folder: Path) -> bool:
    """Whether a folder has a journal with a whole header.

    Raises:
        RunError: If it cannot be read.
    """
    path = folder / JOURNAL_NAME
    if not os.path.exists(path):
        return False
    try:
        check_regular(path)
        with path.open("rb") as file:
            return file.readline().endswith(b"\n")  # else it ends within its header
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def _step(entry: Any) -> Step:
    step = dict(entry)
    step.pop("check", None)
    return step


def header_of(circuit: Circuit) -> dict[str, Any]:
    """The header of a finished run, with what is said of its prompts."""
    record = circuit.record
    header = dict(record.header)
    if record.method is not None and record.method not in header:  # an attribution of an earlier version
        precision = record.precision.to_json()
        header |= {
            "precision": precision,
            "policy_order": list(precision.get("policy", {})),
            record.method: record.arguments.to_json(),
        }
    return header | {DATA: record.task.to_json()}


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
        others = [name for name in found if name not in (*_EVERY_SEARCH, *wanted)]
        if key not in found and key not in _EVERY_SEARCH and others:
            what = f"its search is {_short(others[0])} there, {key} now"
            raise RunError(f"{folder} holds another run: {what}; choose another folder")
        theirs, ours = found.get(key), json.loads(json.dumps(value))
        if key != DATA and ours != theirs:
            if key == "task":
                what = _other_prompts(found.get(DATA), json.loads(json.dumps(wanted.get(DATA))))
            else:
                what = _other(key, theirs, ours)
            raise RunError(f"{folder} holds another run: {what}; choose another folder")


def check_asked(
    folder: Path, name: str, options: Mapping[str, Any], regime: str, prompts: Mapping[str, object]
) -> None:
    """Check that a folder's run was asked for the same, as far as that is known before a model is loaded.

    Args:
        folder: The run's folder; one without a run passes.
        name: Of the search.
        options: Its options; those that are None are only known later.
        regime: Of the precision.
        prompts: What is known of where the prompts will be from.

    Raises:
        RunError: If it was asked for something else, or its journal is damaged.
    """
    found = _header_in(folder)
    if found is None or all(key in _EVERY_SEARCH for key in found):  # an earlier version's may tell no search
        return
    theirs, precision = found.get(name), found.get("precision")
    told = theirs if isinstance(theirs, dict) else {}
    wanted: dict[str, Any] = {}
    if isinstance(precision, dict):
        wanted["precision"] = precision | {"regime": regime}
    wanted[name] = {key: told.get(key) if value is None else value for key, value in options.items()}
    check_header(found, wanted, folder)
    data = found.get(DATA)
    if isinstance(data, dict) and any(
        name in data and data[name] != value for name, value in prompts.items()
    ):
        what = _other_prompts(data, {**data, **prompts})
        raise RunError(f"{folder} holds another run: {what}; choose another folder")


def _header_in(folder: Path) -> Mapping[str, Any] | None:
    """What pins the run in a folder; None where there is none that says so."""
    if os.path.exists(folder / CIRCUIT_NAME):
        try:
            record = read_json(folder / DISCOVERY_NAME)
        except CircuitError:
            return None  # it is told when the circuit is read
        header = record.get("header")
        return header | {DATA: record.get("task")} if isinstance(header, dict) else None
    journal = Journal.read(folder) if is_begun(folder) else None
    return None if journal is None else journal.header


def _other(key: str, theirs: object, ours: object) -> str:
    """How two values of a header differ, as who asks for them would say it."""
    if key == "model":
        return f"its model has other weights (fingerprint {_short(theirs)} there, {_short(ours)} now)"
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [name for name in dict.fromkeys((*ours, *theirs)) if theirs.get(name) != ours.get(name)]
        name = min(names, key=lambda name: name in _FOLLOWS)  # what was chosen first
        usual = FIRST.get(name)
        theirs, ours = theirs.get(name, usual), ours.get(name, usual)
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


def damaged(path: Path, reason: object) -> RunError:
    """The error that a journal cannot be believed."""
    return RunError(
        f"{path} is damaged ({reason}); remove the folder and start anew, or cut the file before that line "
        "and --resume"
    )


def _short(value: object) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
