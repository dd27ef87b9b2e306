"""Forward passes under circuits: as many examples at once as memory allows, from anchors or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import run_to_answers
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.hooks.patched_run import PatchedRun, RunAnchors, record_linears
from pahq_hf.engine.hooks.slopes import ProbedRun
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.budget import default_budget
from pahq_hf.modeling.hooks import hooks
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.device_memory import until_it_fits
from pahq_hf.tasks.base import Task

T = TypeVar("T")

BUFFER_BYTES = 256 << 20  # on a CPU, where more examples at once are no faster


def buffer_bytes(device: torch.device) -> int:
    """Bytes for what writers write in one forward pass; they decide how many examples share it.

    Args:
        device: Where the model is. On a GPU one example at a time leaves most of it idle: an eighth of what
            is free, as anchors take as much again, and attention its part.
    """
    return BUFFER_BYTES if device.type == "cpu" else max(BUFFER_BYTES, default_budget(device) // 2)


@dataclass
class _Part:
    """Examples that share a forward pass.

    Attributes:
        task: The examples, as a task of their own.
        rows: Their rows in the whole task.
        examples: Their numbers in the whole task.
        anchors: The exact run of the current circuit, when tests start from it.
    """

    task: Task
    rows: Tensor
    examples: slice
    anchors: RunAnchors | None = None


class Passes:
    """Runs a model under circuits on a task.

    Args:
        model: The patched model.
        task: The prompts.
        rule: How low precision is used.
        clean: The clean run's final stream, and its embedding.
        substitute: What stands in for removed edges; `use` puts another in its place.
    """

    def __init__(
        self,
        model: PatchedModel,
        task: Task,
        rule: RegimeRule,
        clean: Activations,
        substitute: Activations,
    ) -> None:
        self._model = model
        self._task = task
        self._rule = rule
        self._final_out = clean.final_out
        self._substitute = substitute
        self._shape = substitute.embedding.shape[1:]
        _, length, width = clean.embedding.shape
        example = len(model.graph.writers) * length * width * clean.embedding.element_size()
        self._size = min(len(task), max(1, buffer_bytes(model.device) // example))  # examples in a pass
        self._parts: list[_Part] = []
        self._differences = clean.embedding.new_empty(0)  # [writers, batch, pos, d_model]
        self._aside: list[RunAnchors | None] = []  # anchors of which nothing is made just now
        self._lost: BoolArray | None = None  # what was removed in the exact run whose anchors had to go
        self.fitting(lambda: None)

    def use(self, substitute: Activations) -> None:
        """Let other activations stand in for removed edges."""
        self._substitute = substitute

    def run(self, removed: BoolArray) -> Tensor:
        """Where the model ends without some edges. [rows, d_model]

        Args:
            removed: The edges. [readers, writers]
        """
        return self.fitting(lambda: self._one_run(removed))

    def effects(
        self, removed: BoolArray, reader: int, writers: Sequence[int], gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What removing edges into a reader would add to a metric if all between them were linear.

        Args:
            removed: Edges that are gone. [readers, writers]
            reader: The reader.
            writers: Writers of the edges, gone or not.
            gradient: Of the metric with respect to where the model ends without the removed edges.
                [rows, d_model]

        Returns:
            That, and the length of what each edge carries. Both [writers] in float64
        """
        return self.fitting(lambda: self._one_slope(removed, reader, writers, gradient))

    def anchor(self, removed: BoolArray) -> Tensor:
        """The same exactly, and anchors of what follows from that run."""
        return self.fitting(lambda: self._exact_run(removed))

    def drop_anchors(self) -> None:
        """Run without anchors from now on."""
        for part in self._parts:
            part.anchors = None

    @contextmanager
    def without_anchors(self) -> Iterator[None]:
        """Inside, runs do not start from anchors."""
        self._aside = [part.anchors for part in self._parts]
        removed = None if self._aside[0] is None else self._aside[0].removed
        self.drop_anchors()
        try:
            yield
        finally:
            if self._aside:
                for part, anchors in zip(self._parts, self._aside, strict=True):
                    part.anchors = anchors
                self._aside = []
            elif removed is not None:  # memory ran out meanwhile
                self.anchor(removed)

    def fitting(self, run: Callable[[], T]) -> T:
        """What a run gives; when memory runs out, with half the examples in a pass.

        Raises:
            OutOfMemoryError: If one example does not fit either.
        """

        def whole() -> T:
            if not self._parts:
                self._cut_task()
            if self._lost is not None:
                self._exact_run(self._lost)
                self._lost = None
            return run()

        return until_it_fits(whole, self._give_way, "a run of the model under a circuit", self._model.device)

    def _give_way(self) -> bool:
        more, self._size = self._size > 1 or bool(self._aside), max(1, self._size // 2)
        if self._parts and self._parts[0].anchors is not None:
            self._lost = self._parts[0].anchors.removed
        self._parts, self._aside, self._differences = [], [], self._differences.new_empty(0)
        return more

    def _cut_task(self) -> None:
        """Cut the task into runs of at most so many examples."""
        shape = len(self._model.graph.writers), self._size, *self._shape
        self._differences = self._substitute.embedding.new_zeros(shape)
        self._parts = _parts(self._task, self._size, self._model.device)

    def _exact_run(self, removed: BoolArray) -> Tensor:
        self.drop_anchors()
        final = torch.empty_like(self._final_out)
        for part in self._parts:
            run = self._patched(part, removed, separate=True)
            with (
                record_linears(self._model) as linears,
                self._rule.exactly(self._model),
                hooks(*run.register()),
            ):
                final[part.rows] = run_to_answers(self._model, part.task, part.task.clean_ids)[0]
            differences = self._differences[:, : len(part.task)].clone()
            part.anchors = RunAnchors(
                linears,
                run.heads,
                run.mlp_anchors(),
                differences,
                removed.copy(),
                self._rule.full_writers,
            )
        return final

    def _one_run(self, removed: BoolArray) -> Tensor:
        """Where the model ends without some edges. [rows, d_model]"""
        final = torch.empty_like(self._final_out)
        for part in self._parts:
            linears = {} if part.anchors is None else part.anchors.linears
            run = self._patched(part, removed)
            with self._model.precision.mode.anchored(linears), hooks(*run.register()):
                final[part.rows] = run_to_answers(self._model, part.task, part.task.clean_ids)[0]
        return final

    def _one_slope(
        self, removed: BoolArray, reader: int, writers: Sequence[int], gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, squares = torch.zeros(2, len(writers), dtype=torch.float64)
        for part in self._parts:
            substitute = self._substitute.part(part.examples)
            buffer = self._differences[:, : len(part.task)]
            run = ProbedRun(self._model, substitute, removed, buffer, part.anchors, reader)
            effects, lengths = run.effects(part.task, writers, gradient[part.rows])
            total, squares = total + effects, squares + lengths
        return total, squares.sqrt()

    def _patched(self, part: _Part, removed: BoolArray, *, separate: bool = False) -> PatchedRun:
        substitute = self._substitute.part(part.examples)
        buffer = self._differences[:, : len(part.task)]
        return PatchedRun(self._model, substitute, removed, buffer, part.anchors, separate=separate)


def _parts(task: Task, size: int, device: torch.device) -> list[_Part]:
    """The task cut into runs of at most so many examples."""
    found = []
    for first in range(0, len(task), size):
        examples = slice(first, min(first + size, len(task)))
        part, rows = task.part(examples.start, examples.stop)
        found.append(_Part(part, rows.to(device), examples))
    return found
