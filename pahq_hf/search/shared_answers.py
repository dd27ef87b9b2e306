"""Answers an engine gave, so that searches with a common beginning compute it once.

An engine's answer depends on the edges kept when the search turned to a reader, and on the trials made and
accepted since: nothing else (the state of an engine is a function of the edge set, which resumed searches
rely on too). So two searches that make the same calls get the same answers, to the bit. Searches at two
thresholds do, up to and including the batch in which their decisions first differ: there is no rule about
thresholds, margins or batches here that could be wrong, as each search runs whole and only its engine
recalls.

Once decisions differ nothing is shared any more: the edge sets differ for good. Where only second looks
differ, searches part within a reader and meet again at the next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.files import write_text
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.json_reader import OWN_BYTES, parse_json, read_regular
from pahq_hf.engine.protocol import Engine, Slopes, Trial
from pahq_hf.errors import RunError
from pahq_hf.search.journal import Chain, check_header

logger = logging.getLogger(__name__)
Values = Sequence[float]
_Kind = Literal["try", "look"]


class EngineCache:
    """Answers of engines by a digest of what they depend on; if one is given in a file that survives a crash.

    A line of the file is a fact whatever follows it, so what a crash tore off costs time only. Each has a
    checksum; answers of earlier versions have none and are computed again.
    """

    def __init__(self) -> None:
        self._known: dict[str, array[float]] = {}  # 8 bytes a value: there can be millions
        self._path: Path | None = None

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any]) -> EngineCache:
        """Read the answers in a file, and append what comes.

        Args:
            path: The file; made where there is none.
            header: What pins the answers; must match the file's.

        Raises:
            RunError: If the file cannot be read or written, or is of other searches.
        """
        answers = cls()
        answers._path = path
        try:
            raw = read_regular(path, OWN_BYTES) if os.path.lexists(path) else b""
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from error
        first, newline, rest = raw.partition(b"\n")
        if not newline:
            answers._start(header)
            return answers
        chain = Chain()
        try:
            is_sealed = chain.verify(first)
            check_header(dict(parse_json(first)), header, path.parent)
        except (ValueError, TypeError) as error:
            raise _damaged(path, f"line 1, its header: {error}") from error
        if not is_sealed:
            logger.warning(
                "%s has no checksums, an earlier version wrote it; its answers are computed again", path
            )
            answers._start(header)
            return answers
        size = len(first) + 1 + answers._read(rest)
        if size < len(raw):
            write_text(path, raw[:size].decode())
        return answers

    def _start(self, header: Mapping[str, Any]) -> None:
        assert self._path is not None
        write_text(self._path, Chain().seal(header).decode())

    def _read(self, raw: bytes) -> int:
        """Take over whole lines; returns the bytes of those."""
        done = 0
        for number, line in enumerate(raw.split(b"\n")[:-1], start=2):  # the last was not finished
            try:
                key, values, *check = parse_json(line)
                known = array("d", values)
            except (ValueError, TypeError):
                break
            if check != [_check(key, values)]:
                assert self._path is not None
                raise _damaged(self._path, f"the answer on line {number} does not have its checksum")
            self._known[str(key)] = known
            done += len(line) + 1
        return done

    def __len__(self) -> int:
        """How many answers there are."""
        return len(self._known)

    def get(self, key: str) -> Values | None:
        """The answer, if it is known."""
        return self._known.get(key)

    def add(self, key: str, values: Values) -> None:
        """Remember an answer.

        Raises:
            RunError: If the file cannot be written, for instance on a full disk.
        """
        self._known[key] = array("d", values)
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps([key, list(values), _check(key, values)]).encode() + b"\n")
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}") from error


class RecallingEngine:
    """An engine that answers from memory as long as it can; then another one takes over.

    Args:
        engine: Computes what is not known.
        answers: What is known; gets what is computed.
        source: What answers depend on beside the calls: which engine computes, and where.

    Attributes:
        recalled: Metric values known already.
        recalled_readers: Readers about which nothing had to be computed.
    """

    def __init__(self, engine: Engine, answers: EngineCache, source: str) -> None:
        self._engine = engine
        self._answers = answers
        self._source = source
        self.name = engine.name
        self.graph = engine.graph
        self.gains_by_batches = engine.gains_by_batches
        self.phases = engine.phases
        self.clean_logits = engine.clean_logits
        self.recalled = 0
        self.recalled_readers = 0
        self._kept = engine.graph.all_edges.copy()
        self._in_step = False  # whether the engine is where the search is
        self._reader: int | None = None
        self._start = self._kept  # edges when the search turned to the reader
        self._gone: list[int] = []  # the reader's, in the order in which they went
        self._accepted: list[tuple[Trial, int]] = []  # since then
        self._asked: _Kind | None = None  # the last question, if nothing was accepted since
        self._key = ""
        self._computed = False  # whether anything about the reader was

    @property
    def evaluations(self) -> int:
        """Metric values the engine computed, whoever asked it."""
        return self._engine.evaluations

    # -- the protocol of an engine ------------------------------------------------------------------

    def begin(self, kept: BoolArray) -> float:
        """Make an edge set the current circuit; its metric."""
        self._leave_reader()
        self._kept = kept.copy()
        self._in_step = False
        key = _digest(self._source, "begin", _packed(kept))
        known = self._recall(key)
        if known is None:
            known = self._learn(key, [self._engine.begin(kept)])
            self._in_step = True
        return known[0]

    def focus(self, reader: int) -> float | None:
        """Turn to a reader; the metric measured again when that changed what tests start from."""
        self._leave_reader()
        self._reader, self._start, self._accepted = reader, self._kept.copy(), []
        self._gone = np.flatnonzero(self.graph.all_edges[reader] & ~self._kept[reader]).tolist()
        self._key = _digest(self._source, "focus", reader, _packed(self._kept))
        self._asked = None
        known = self._recall(self._key)
        if known is not None:
            self._in_step = False
        else:
            if not self._in_step:
                self._engine.begin(self._kept)
            measured = self._engine.focus(reader)
            self._in_step = True
            known = self._learn(self._key, [] if measured is None else [measured])
        return known[0] if known else None

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Metric with exactly each candidate's edges into `reader` gone."""
        return self._ask("try", reader, candidates)

    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """The same in FP32."""
        return self._ask("look", reader, candidates)

    def slopes(self, reader: int, candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Slopes:
        """How the metric moves, to first order, as edges into a reader go; it is computed."""
        if reader != self._reader:
            self.focus(reader)
        self._catch_up()
        found = self._engine.slopes(reader, candidates, writers)
        self._computed = True
        return found

    def accept(self, trial: Trial, k: int) -> None:
        """Make a trial's k-th circuit, as to its reader, the current one."""
        gone = list(trial.candidates[k])
        if trial.reader == self._reader:
            back = [writer for writer in self._gone if writer not in set(gone)]
            new = [writer for writer in gone if writer not in set(self._gone)]
            if back or self._asked == "look":
                self._note("restore", back)
            if new:
                self._note("remove", new)
            self._gone = [writer for writer in self._gone if writer not in set(back)] + new
            self._accepted.append((trial, k))
            self._asked = None
        self._kept[trial.reader] = self.graph.all_edges[trial.reader]
        self._kept[trial.reader, gone] = False
        if self._in_step:
            self._engine.accept(trial, k)
        if trial.reader != self._reader:
            self._leave_reader()

    def cut(self, reader: int, writers: Sequence[int]) -> None:
        """Remove exactly these edges into a reader from the current circuit."""
        self.accept(Trial.of(reader, [writers], ()), 0)

    def metric_of(self, kept: BoolArray) -> float:
        """The metric of any circuit; it is computed."""
        return self._engine.metric_of(kept)

    def drop_each(self, kept: BoolArray, edges: BoolArray | None = None) -> NDArray[np.float64]:
        """What removing each edge of any circuit alone adds to its metric; it is computed."""
        return self._engine.drop_each(kept, edges)

    def add_each(self, kept: BoolArray, absent: BoolArray) -> NDArray[np.float64]:
        """What adding each of some edges alone to any circuit adds to its metric; it is computed."""
        return self._engine.add_each(kept, absent)

    def finish(self) -> None:
        """Release what the engine took."""
        self._leave_reader()
        self._in_step = False
        self._engine.finish()

    # -- recalling ----------------------------------------------------------------------------------

    def _recall(self, key: str) -> Values | None:
        known = self._answers.get(key)
        self.recalled += 0 if known is None else len(known)
        return known

    def _learn(self, key: str, values: Sequence[float]) -> Values:
        self._computed = True
        self._answers.add(key, values)
        return values

    def _ask(self, kind: Literal["try", "look"], reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        if reader != self._reader:
            self.focus(reader)
        if self._asked == "try":
            self._note("remove", ())  # every try of a batch is followed by what went, be that nothing
        gone = set(self._gone) if kind == "try" else set[int]()  # keys have what goes beside what is gone
        sets = tuple(tuple(writer for writer in some if writer not in gone) for some in candidates)
        back = [sorted(gone.difference(some)) for some in candidates]
        key = _digest(self._key, kind, sets, *([back] if any(back) else []))
        known = self._recall(key)
        if known is None:
            self._catch_up()
            answer = self._engine.try_ if kind == "try" else self._engine.look_again
            known = self._learn(key, answer(reader, candidates).values)
        self._key = key
        self._asked = None if sets == ((),) else kind  # the current circuit itself has nothing to lose
        return Trial.of(reader, candidates, known)

    def _note(self, kind: Literal["remove", "restore"], writers: Sequence[int]) -> None:
        self._key = _digest(self._key, kind, (tuple(writers),))

    def _catch_up(self) -> None:
        """Bring the engine to where the search is; trials themselves change nothing."""
        reader = self._reader
        if self._in_step or reader is None:
            return
        self._engine.begin(self._start)
        self._engine.focus(reader)
        for trial, k in self._accepted:
            self._engine.accept(trial, k)
        self._in_step = True

    def _leave_reader(self) -> None:
        if self._reader is not None and not self._computed:
            self.recalled_readers += 1
        self._reader, self._computed = None, False


def _check(key: str, values: Values) -> str:
    return f"{zlib.crc32(json.dumps([key, list(values)]).encode()):08x}"


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(f"{path} is damaged ({reason}); remove it: it only saves time")


def _packed(kept: BoolArray) -> bytes:
    return np.packbits(kept).tobytes()


def _digest(*parts: object) -> str:
    """128 bits that stand for the parts."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part if isinstance(part, bytes) else repr(part).encode()
        made.update(len(raw).to_bytes(8, "little") + raw)
    return made.hexdigest()
