"""Minibatches of prompt pairs, their runs captured when a step needs them.

Runs of hundreds of pairs may not fit into memory, so each minibatch has its own. Those that are captured
first stay while there is room; the others are captured again each time, two forward passes more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pahq_hf.engine.protocol import CircuitRuns, Part
from pahq_hf.engine.setting import Setting
from pahq_hf.precision.device_memory import free_memory
from pahq_hf.tasks.base import Task

_SHARE = 8  # of the memory that is free, one in so many bytes may be runs that stay


@dataclass(frozen=True, eq=False)
class Minibatch:
    """Prompt pairs of one step.

    Attributes:
        runs: Where gradients are taken.
        parts: The pairs, as many at once as memory allows.
        share: Of the metric of `runs` that is theirs.
    """

    runs: CircuitRuns
    parts: Sequence[Part]
    share: float

    @classmethod
    def of(cls, runs: CircuitRuns) -> Minibatch:
        """All pairs of some runs."""
        return cls(runs, list(runs.circuit_parts()), 1.0)

    @property
    def pairs(self) -> int:
        """How many."""
        return sum(len(part.task) for part in self.parts)

    def at_circuit(self, shares: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """How far the metric is from the full model's at a circuit, and what removing each edge adds to it.

        Args:
            shares: Of each edge. [readers, writers]

        Returns:
            `m(C) - m(full)`, and [readers, writers]
        """
        found = [self.runs.at_circuit(part, shares) for part in self.parts]
        effects: NDArray[np.float64] = np.sum([effects for _, effects in found], axis=0) / self.share
        gap = sum(value - part.full for (value, _), part in zip(found, self.parts, strict=True))
        return gap / self.share, effects

    def at_circuits(self, shares: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The same where each pair has a circuit of its own.

        Args:
            shares: Of each edge. [pairs, readers, writers]

        Returns:
            How far the metric is from the full model's, and what removing each edge from each pair's circuit
            adds to it. [pairs, readers, writers]
        """
        gap, found, first = 0.0, [], 0
        for part in self.parts:
            last = first + len(part.task)
            value, effects = self.runs.at_circuit(part, shares[first:last])
            gap, first = gap + value - part.full, last
            found.append(effects)
        return gap / self.share, np.concatenate(found) / self.share


class Minibatches(Protocol):
    """Minibatches by number."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, number: int) -> Minibatch:
        """One of them."""


class CapturedAnew:
    """Minibatches of which each has runs of its own.

    Args:
        tasks: Where the pairs are from; no minibatch has pairs of two of them.
        least: Pairs of a minibatch, at least, where a task has so many.
        seed: Of the order of the pairs.
        capture: Captures the runs of a minibatch.
        room: Bytes of runs that stay.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        least: int,
        seed: int,
        capture: Callable[[Task], CircuitRuns],
        room: int,
    ) -> None:
        drawn = random.Random(f"minibatches {seed}")
        self._tasks: list[Task] = []
        for task in tasks:
            order = list(range(len(task)))
            drawn.shuffle(order)
            count = max(1, len(task) // least)
            self._tasks += [task.select(sorted(order[k::count])) for k in range(count)]
        drawn.shuffle(self._tasks)
        self._capture = capture
        self._kept: dict[int, Minibatch] = {}
        self._room = room

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, number: int) -> Minibatch:
        found = self._kept.get(number)
        if found is None:
            runs = self._capture(self._tasks[number])
            found = Minibatch.of(runs)
            if runs.nbytes <= self._room:
                self._room -= runs.nbytes
                self._kept[number] = found
        return found


class OfOneRun:
    """Minibatches of runs that were captured together: where means over all pairs replace what is removed.

    Args:
        runs: The runs.
        least: Pairs of a minibatch, at least.
    """

    def __init__(self, runs: CircuitRuns, least: int) -> None:
        found: list[list[Part]] = [[]]
        for part in runs.circuit_parts(least):
            if _pairs(found[-1]) >= least:
                found.append([])
            found[-1].append(part)
        if len(found) > 1 and _pairs(found[-1]) < least:  # what is left over goes with the last
            last = found.pop()
            found[-1] += last
        whole = sum(map(_pairs, found))
        self._batches = [Minibatch(runs, parts, _pairs(parts) / whole) for parts in found]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Minibatch:
        return self._batches[number]


def _pairs(parts: Sequence[Part]) -> int:
    return sum(len(part.task) for part in parts)


def minibatches_of(
    tasks: Sequence[Task],
    least: int,
    seed: int,
    setting: Setting,
    capture: Callable[[Task], CircuitRuns],
    times: int = 1,
) -> Minibatches:
    """Minibatches of the pairs that are learned from.

    Args:
        tasks: The pairs (`pairs.learned_from`).
        least: Pairs of a minibatch, at least, where a task has so many.
        seed: Of their order.
        setting: Tells what stands in for removed edges.
        capture: Captures the runs of some pairs.
        times: How often each pair of a minibatch is in it.
    """

    def repeated(task: Task) -> CircuitRuns:
        return capture(task.select([pair for pair in range(len(task)) for _ in range(times)]))

    run = capture if times == 1 else repeated
    if setting.has_means:
        return OfOneRun(run(tasks[0]), least * times)
    room = free_memory(setting.model.device) // _SHARE
    return CapturedAnew(tasks, least, seed, run, room)
