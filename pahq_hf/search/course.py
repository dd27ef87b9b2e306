"""The circuits that a search has come through, and which of them is the best by the pairs that judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.verdict import faithfulness
from pahq_hf.engine.protocol import Engine
from pahq_hf.search.pairs import Split, validation_pairs
from pahq_hf.search.rounds import GAIN, Edge, Scale, changed, least_first
from pahq_hf.search.units import Units
from pahq_hf.search.work import Work
from pahq_hf.tasks.base import Task


class Judged(Protocol):
    """What was measured of a circuit."""

    @property
    def metric(self) -> float:
        """On the pairs that are searched."""

    @property
    def validation(self) -> float | None:
        """On those that judge; None if there are none."""


@dataclass(frozen=True, eq=False)
class Passed:
    """A circuit on the way.

    Attributes:
        kept: Its edges. [readers, writers]
        metric: On the pairs that are searched.
        validation: On those that judge; None if there are none.
    """

    kept: BoolArray
    metric: float
    validation: float | None = None

    @property
    def size(self) -> int:
        """How many edges it has."""
        return int(self.kept.sum())

    def facts(self) -> dict[str, Any]:
        """What is said of it where circuits of many sizes are."""
        found = {"edges": self.size, "metric": self.metric}
        return found if self.validation is None else found | {"validation": self.validation}


@dataclass(frozen=True)
class Beginning:
    """What a search decides before anything else: its first step.

    Attributes:
        numbers: The task's pairs that judge.
        searched: The scale of the pairs that are searched.
        validation: The scale of the pairs that judge; None if there are none.
    """

    numbers: tuple[int, ...]
    searched: Scale
    validation: Scale | None

    def to_json(self) -> dict[str, Any]:
        """As a step of a journal."""
        found = {"validation": list(self.numbers), "searched": self.searched.to_json()}
        return found if self.validation is None else found | {"judged": self.validation.to_json()}

    @classmethod
    def read(cls, step: Mapping[str, Any], task: Task) -> Beginning:
        """Read what `to_json` made.

        Raises:
            ValueError: If it is none of this task's; or TypeError or KeyError.
        """
        numbers = step["validation"]
        if any(type(number) is not int for number in numbers):
            raise TypeError("a value is of another type")
        Split.of(task, numbers)
        judged = Scale.read(step["judged"]) if numbers else None
        return cls(tuple(numbers), Scale.read(step["searched"]), judged)

    @property
    def judge(self) -> Scale:
        """The scale by which circuits are chosen."""
        return self.searched if self.validation is None else self.validation

    def is_near(self, one: Judged, other: Judged) -> bool:
        """Whether no swap would be made for what two circuits differ by, on either kind of pairs."""
        near = abs(one.metric - other.metric) <= GAIN * self.searched.whole
        if self.validation is None or one.validation is None or other.validation is None:
            return near
        return near and abs(one.validation - other.validation) <= GAIN * self.validation.whole

    def gap(self, passed: Judged) -> float:
        """How far a circuit is from the full model by what judges it."""
        return self.judge.gap(passed.metric if passed.validation is None else passed.validation)


class Measures:
    """The engines of a search whose task is in two.

    Args:
        split: The task.
        units: What is kept or removed.
        engine: Computes metrics of the pairs that are searched.
        judge: Of those that judge; None if there are none.
    """

    def __init__(self, split: Split, units: Units, engine: Engine, judge: Engine | None) -> None:
        self.split = split
        self._units = units
        self.engine = engine
        self._judge = judge

    @classmethod
    @contextmanager
    def of(cls, work: Work[Any], split: Split) -> Iterator[Measures]:
        """The engines, their runs captured; they are gone afterwards."""
        with work.engine_on(split.searched) as engine:
            if split.validation is None:
                yield cls(split, work.units, engine, None)
                return
            with work.engine_on(split.validation) as judge:
                yield cls(split, work.units, engine, judge)

    def begin(self) -> Beginning:
        """Measure the scales."""
        validation = None if self._judge is None else Scale.of(self._judge, self._units)
        return Beginning(self.split.numbers, Scale.of(self.engine, self._units), validation)

    def validation_of(self, kept: BoolArray) -> float | None:
        """A circuit's metric on the pairs that judge; None if there are none."""
        return None if self._judge is None else self._judge.metric_of(kept)

    def of_circuit(self, kept: BoolArray) -> Passed:
        """A circuit, measured."""
        return Passed(kept, self.engine.metric_of(kept), self.validation_of(kept))

    def without_idle(self, beginning: Beginning, passed: Passed, may_go: Callable[[Passed], bool]) -> Passed:
        """A circuit without the edges that do nothing there, on either kind of pairs.

        Args:
            beginning: What is nothing is a share of its scales.
            passed: The circuit.
            may_go: Whether what is left without some of them will do.

        Returns:
            What is left of it; the circuit itself if every edge does something.
        """
        graph, now = self.engine.graph, passed
        while idle := self._idle(beginning, now):
            size = len(idle)
            while size > 0:  # of edges that stand in for each other, each alone does nothing
                other = self.of_circuit(graph.live_edges(changed(now.kept, idle[:size], ())))
                if may_go(other):
                    break
                size //= 2
            if size == 0:
                break
            now = other
        return now

    def _idle(self, beginning: Beginning, passed: Passed) -> list[Edge]:
        """Edges of a circuit that do nothing, those first that move the metric least."""
        effects = self.engine.drop_each(passed.kept)
        idle = passed.kept & (abs(effects) <= beginning.searched.nothing)
        if self._judge is not None and beginning.validation is not None and idle.any():
            idle &= abs(self._judge.drop_each(passed.kept)) <= beginning.validation.nothing
        return [edge for edge in least_first(passed.kept, effects) if idle[edge]]

    def facts(self, beginning: Beginning, passed: Passed) -> dict[str, Any]:
        """What a run says of its circuit on either kind of pairs."""
        found = {"searched": _facts(self.split.searched, beginning.searched, passed.metric)}
        judged, scale, value = self.split.validation, beginning.validation, passed.validation
        if judged is not None and scale is not None and value is not None:
            found["validation"] = _facts(judged, scale, value)
        return found


def _facts(task: Task, scale: Scale, metric: float) -> dict[str, Any]:
    return {
        "examples": len(task),
        "full": scale.full,
        "empty": scale.empty,
        "metric": metric,
        "faithfulness": faithfulness(metric, scale.full, scale.empty),
    }


def split_of(work: Work[Any], share: float, seed: int) -> Split:
    """The task in two: as an interrupted run split it, or drawn now.

    Args:
        work: The search.
        share: Of the pairs that judge.
        seed: Of the draw.

    Raises:
        RunError: If the first step of an interrupted run says no such thing.
    """
    task = work.setting.task
    if not work.steps:
        return Split.of(task, validation_pairs(task, share, seed))
    return Split.of(task, kept_beginning(work).numbers)


def kept_beginning(work: Work[Any]) -> Beginning:
    """The first step of an interrupted run.

    Raises:
        RunError: If it is none.
    """
    try:
        return Beginning.read(work.steps[0], work.setting.task)
    except (KeyError, ValueError, TypeError) as error:
        raise work.damaged(1, f": {error}") from error
