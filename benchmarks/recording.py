"""What a search asked of its engine, and the means to set any single test of it up again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.engine.protocol import Engine, Slopes, Trial


@dataclass(frozen=True)
class Test:
    """One test that decided an edge.

    Attributes:
        reader: The edge's reader.
        writer: The edge's writer.
        value: Metric without the edge.
        removals: How many edges were gone when it was tested.
    """

    __test__ = False  # for pytest

    reader: int
    writer: int
    value: float
    removals: int


@dataclass
class Log:
    """What happened in a search.

    Attributes:
        graph: The model's graph.
        decided: Every test that decided an edge, by (reader, writer), in order.
        removals: Every edge that went, as (reader, writer), in order.
        batches: Calls of `try_`.
        candidates: Metric values these calls returned; more than `tests` when speculation went too far.
    """

    graph: Graph
    decided: dict[tuple[int, int], Test] = field(default_factory=dict)
    removals: list[tuple[int, int]] = field(default_factory=list)
    batches: int = 0
    candidates: int = 0

    @property
    def tests(self) -> list[Test]:
        """Every test that decided an edge, in order."""
        return list(self.decided.values())

    def sample(self, count: int) -> list[Test]:
        """At most `count` tests, evenly spaced over the run."""
        tests = self.tests
        count = min(count, len(tests))
        return [tests[int((number + 0.5) * len(tests) / count)] for number in range(count)]

    def kept_before(self, test: Test) -> BoolArray:
        """The edges there were when a test was made. [readers, writers]"""
        kept = self.graph.all_edges.copy()
        gone = np.array(self.removals[: test.removals], dtype=np.int64).reshape(-1, 2)
        kept[gone[:, 0], gone[:, 1]] = False
        return kept


class Recorder:
    """An engine that passes everything on to another one and keeps a log.

    Args:
        engine: The engine that does the work.

    Attributes:
        log: What happened so far.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.name
        self.graph: Graph = engine.graph
        self.gains_by_batches = engine.gains_by_batches
        self.phases = engine.phases
        self.clean_logits = engine.clean_logits
        self.evaluations = engine.evaluations
        self.log = Log(engine.graph)
        self._tried: Trial | None = None  # the last trial, until it is known what it decided
        self._gone: dict[int, list[int]] = {}  # by reader, in the order in which they went

    def begin(self, kept: BoolArray) -> float:
        """Start from an edge set."""
        value = self._engine.begin(kept)
        self.evaluations = self._engine.evaluations
        return value

    def focus(self, reader: int) -> float | None:
        """Turn to a reader."""
        self._decide(0)
        value = self._engine.focus(reader)
        self.evaluations = self._engine.evaluations
        return value

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Try a batch; what it decided is known when it is accepted, or when the next call comes."""
        self._decide(0)
        trial = self._engine.try_(reader, candidates)
        self.evaluations = self._engine.evaluations
        self.log.batches += 1
        self.log.candidates += len(trial.values)
        self._tried = trial
        return trial

    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Test again in FP32."""
        self._decide(0)
        trial = self._engine.look_again(reader, candidates)
        self.evaluations = self._engine.evaluations
        return trial

    def slopes(self, reader: int, candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Slopes:
        """Take gradients."""
        self._decide(0)
        slopes = self._engine.slopes(reader, candidates, writers)
        self.evaluations = self._engine.evaluations
        return slopes

    def accept(self, trial: Trial, k: int) -> None:
        """Write down what a batch decided, or what a second look undid: that will be decided again."""
        self._engine.accept(trial, k)
        if self._tried is not None:
            self._decide(k + 1)
        self._write(trial.reader, trial.candidates[k])

    def cut(self, reader: int, writers: Sequence[int]) -> None:
        """Remove edges untried."""
        self._decide(0)
        self._engine.cut(reader, writers)
        self._write(reader, writers)

    def metric_of(self, kept: BoolArray) -> float:
        """The metric of any circuit."""
        return self._engine.metric_of(kept)

    def drop_each(self, kept: BoolArray) -> NDArray[np.float64]:
        """What removing each edge of a circuit alone adds."""
        return self._engine.drop_each(kept)

    def finish(self) -> None:
        """Release what the engine took."""
        self._decide(0)
        self._engine.finish()

    def _decide(self, removed: int) -> None:
        """The last batch decided that its first edges go and that the one after them stays."""
        trial, self._tried = self._tried, None
        if trial is None:
            return
        gone = len(self.log.removals)
        tried = [candidate[-1] for candidate in trial.candidates][: removed + 1]
        for number, (writer, value) in enumerate(zip(tried, trial.values, strict=False)):
            edge = trial.reader, writer
            self.log.decided.pop(edge, None)  # it may have been undone by a second look
            self.log.decided[edge] = Test(*edge, value, gone + number)

    def _write(self, reader: int, writers: Sequence[int]) -> None:
        """Exactly these edges into a reader are gone now."""
        before = self._gone.get(reader, [])
        back = {(reader, writer) for writer in before if writer not in set(writers)}
        self.log.removals = [edge for edge in self.log.removals if edge not in back]
        self.log.removals += [(reader, writer) for writer in writers if writer not in set(before)]
        self._gone[reader] = list(writers)


@dataclass(frozen=True)
class Sample:
    """Single tests made again by some engine.

    Attributes:
        tests: How many.
        mean_ms: Mean milliseconds of a test.
        min_ms: The fastest.
        max_ms: The slowest.
        deviation: Largest difference from the metric values of the recorded run.
        relative_deviation: Largest difference divided by the value itself.
        agrees: Whether no value differs by more than 1e-5, relative to values above 1.
    """

    tests: int
    mean_ms: float
    min_ms: float
    max_ms: float
    deviation: float
    relative_deviation: float
    agrees: bool


_TOLERANCE = 1e-5


def repeat_tests(engine: Engine, log: Log, count: int, *, warm: bool) -> Sample:
    """Make evenly spaced tests of a recorded run again, each exactly at its place in the run.

    Only `try_` is timed: neither going to that place nor turning to the reader.

    Args:
        engine: The engine to time.
        log: The run.
        count: Number of tests.
        warm: Time the second of two equal calls: within a run, all but a reader's first test find its
            weights at hand.

    Returns:
        Times, and how far values are from the run's.
    """
    seconds, ours, theirs = [], [], []
    for test in log.sample(count):
        kept = log.kept_before(test)
        # Tests start from the circuit as it was when the search turned to their reader.
        gone = np.flatnonzero(log.graph.all_edges[test.reader] & ~kept[test.reader]).tolist()
        kept[test.reader, gone] = True
        engine.begin(kept)
        engine.focus(test.reader)
        engine.cut(test.reader, gone)
        candidates = [[*gone, test.writer]]
        if warm:
            engine.try_(test.reader, candidates)
        started = time.perf_counter()
        ours.append(engine.try_(test.reader, candidates).values[0])
        seconds.append(time.perf_counter() - started)
        theirs.append(test.value)
        engine.finish()
    times, values = 1000 * np.array(seconds), np.array(theirs)
    differences = np.abs(np.array(ours) - values)
    return Sample(
        tests=len(times),
        mean_ms=float(times.mean()),
        min_ms=float(times.min()),
        max_ms=float(times.max()),
        deviation=float(differences.max()),
        relative_deviation=float((differences / np.maximum(np.abs(values), 1e-12)).max()),
        agrees=bool((differences <= _TOLERANCE * np.maximum(1, np.abs(values))).all()),
    )
