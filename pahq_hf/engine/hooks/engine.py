"""The hooks engine: the Hugging Face model itself, with forward hooks, for any edge set.

It is slow and simple: one whole forward pass per circuit. It serves evaluation, families the sparse
engine cannot cut, and it is the referee of the sparse engine in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import capture, exact_logits, run_to_answers
from pahq_hf.capture.store import ActivationStore
from pahq_hf.capture.substitutes import ablated, with_streams, written_heads
from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.config import Ablation, EngineName
from pahq_hf.engine.hooks.patched_run import PatchedRun, RunAnchors, record_linears
from pahq_hf.engine.phases import Phases
from pahq_hf.engine.protocol import Trial
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.budget import default_budget
from pahq_hf.modeling.hooks import hooks
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.device_memory import memory_for, until_it_fits
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import Metric

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


class HooksEngine:
    """Metric and logits of any circuit, by running the Hugging Face model with patched readers.

    Args:
        model: The patched model. Its precision at construction is the one of the captured runs.
        task: The prompts.
        metric: What to minimise.
        ablation: What stands in for removed edges.
        rule: How low precision is used.
        store: Where captured activations go; memory by default.

    Raises:
        TaskError: If the prompts do not fit the model.
        MetricError: If the task lacks what the metric needs, or a run's metric is NaN.
    """

    name: EngineName = "hooks"
    gains_by_batches = False  # candidates run one by one

    def __init__(
        self,
        model: PatchedModel,
        task: Task,
        metric: str,
        *,
        ablation: Ablation = "corrupted",
        rule: RegimeRule | None = None,
        store: ActivationStore | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.graph: Graph = model.graph
        self._rule = rule or RegimeRule()
        what = f"what {len(task)} prompt pairs of {task.length} tokens write and read in the model"
        with self._rule.exactly(self.model), memory_for(what, model.device):
            clean = capture(model, task, task.clean_ids, store)
            self.corrupted = capture(model, task, task.corrupted_ids, store)
            self.substitute: Activations = ablated(model, clean, self.corrupted, task, ablation, store)
        self._fixed = ablation != "corrupted"
        self.clean_logits = clean.logits
        self._clean = Activations(logits=clean.logits, final_out=clean.final_out)  # the rest may go
        self.metric = Metric(metric, task, clean.logits, model.device)
        for run in (clean, self.corrupted):
            self.metric(run.logits)  # NaN fails here, before anything is searched or written
        self._ablated = self.substitute  # with the streams these writers add up to
        self._removed = self.graph.no_edges()
        self._restore: list[tuple[list[Tensor], int, Tensor]] = []
        _, length, width = clean.embedding.shape
        example = len(self.graph.writers) * length * width * clean.embedding.element_size()
        self._size = min(len(task), max(1, buffer_bytes(model.device) // example))  # examples in a pass
        self._parts: list[_Part] = []
        self._differences = clean.embedding.new_empty(0)
        self._aside: list[RunAnchors | None] = []  # anchors of which nothing is made just now
        self._lost: BoolArray | None = None  # what was removed in the exact run whose anchors had to go
        self._fitting(lambda: None)
        self.evaluations = 0
        self.phases = Phases()
        self._reader: int | None = None  # in focus

    def _cut_task(self) -> None:
        """Cut the task into runs of at most so many examples."""
        shape = len(self.graph.writers), self._size, *self.substitute.embedding.shape[1:]
        self._differences = self.substitute.embedding.new_zeros(shape)
        self._parts = _parts(self.task, self._size, self.model.device)

    # -- any circuit ------------------------------------------------------------------------------

    def logits(self, kept: BoolArray) -> Tensor:
        """Logits of a circuit at the answer positions, exact in how they differ from the full model's.

        Args:
            kept: Its edges. [readers, writers]

        Returns:
            [rows, vocab] in float64
        """
        if self._rule.raise_active and not self._rule.anchored:
            self._unraise()  # a circuit's value does not depend on who is in focus
        with self._without_anchors(), self._rule.exactly(self.model):
            return self._run(self.graph.all_edges & ~kept)

    def metric_of(self, kept: BoolArray) -> float:
        """The minimised metric of a circuit."""
        return self._value(self.logits(kept))

    def drop_each(self, kept: BoolArray) -> NDArray[np.float64]:
        """What removing each edge of a circuit alone adds to the metric, one whole run for each.

        Args:
            kept: The circuit. [readers, writers]

        Returns:
            m(C without the edge) - m(C), 0 where there is no edge. [readers, writers]
        """
        before, effects = self.metric_of(kept), np.zeros(kept.shape)
        for edge in edge_list(kept):
            without = kept.copy()
            without[edge] = False
            effects[edge] = self.metric_of(without) - before
        return effects

    # -- the current circuit ------------------------------------------------------------------------

    def begin(self, kept: BoolArray) -> float:
        """Make an edge set the current circuit; its metric."""
        self._unraise()  # what is raised depends on the reader that comes into focus next
        self._removed = self.graph.all_edges & ~kept
        return self._measure_exactly() if self._rule.anchored else self._measure(self._removed)

    def focus(self, reader: int) -> float | None:
        """Turn to a reader; the metric measured again when that changed what tests start from."""
        self._reader = reader
        if not self._rule.raise_active:
            return None
        names = [self.graph.writers[node].name for node in self.graph.readers[reader].nodes]
        changed = self._fitting(lambda: self.model.precision.activate(*names))
        if self._rule.anchored:
            return self._measure_exactly()
        if not changed:
            return None
        self._fitting(lambda: self._recompute_substitute(reader))
        return self._measure(self._removed)

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Metric with exactly each candidate's edges into `reader` gone."""
        if reader != self._reader:
            self.focus(reader)
        return Trial.of(reader, candidates, [self._measure(self._without(reader, c)) for c in candidates])

    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """The same in FP32."""
        if reader != self._reader:
            self.focus(reader)
        with self._without_anchors(), self.model.precision.full_precision():
            values = [self._measure(self._without(reader, writers)) for writers in candidates]
        return Trial.of(reader, candidates, values)

    def _without(self, reader: int, writers: Sequence[int]) -> BoolArray:
        """What is removed when exactly these edges into a reader are. [readers, writers]"""
        removed = self._removed.copy()
        removed[reader] = False
        removed[reader, list(writers)] = True
        return removed

    def accept(self, trial: Trial, k: int) -> None:
        """Make a trial's k-th circuit, as to its reader, the current one."""
        self.cut(trial.reader, trial.candidates[k])

    def cut(self, reader: int, writers: Sequence[int]) -> None:
        """Remove exactly these edges into a reader from the current circuit."""
        self._removed = self._without(reader, writers)
        if reader != self._reader:
            self._reader = None  # tests start from another circuit now

    def finish(self) -> None:
        """Leave the model as it was."""
        self.model.precision.release()
        self._unraise()

    def _unraise(self) -> None:
        """Go back to where no reader is in focus."""
        self._reader = None
        self.model.precision.deactivate()
        self._undo_substitute()
        self._ablated = self.substitute
        self._drop_anchors()

    # -- one run ----------------------------------------------------------------------------------

    def _measure(self, removed: BoolArray) -> float:
        self.evaluations += 1
        return self._value(self._run(removed))

    def _drop_anchors(self) -> None:
        for part in self._parts:
            part.anchors = None

    @contextmanager
    def _without_anchors(self) -> Iterator[None]:
        self._aside = [part.anchors for part in self._parts]
        removed = None if self._aside[0] is None else self._aside[0].removed
        self._drop_anchors()
        yield
        if self._aside:
            for part, anchors in zip(self._parts, self._aside, strict=True):
                part.anchors = anchors
            self._aside = []
        elif removed is not None:  # memory ran out meanwhile
            self._anchor(removed)

    def _measure_exactly(self) -> float:
        """Run the current circuit in FP32 and take it as the anchor of what follows."""
        self.evaluations += 1
        return self._value(self._logits(self._anchor(self._removed)))

    def _anchor(self, removed: BoolArray) -> Tensor:
        """Anchors from an exact run of a circuit, and where that ends. [rows, d_model]"""
        return self._fitting(lambda: self._exact_run(removed))

    def _fitting(self, run: Callable[[], T]) -> T:
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

        return until_it_fits(whole, self._give_way, "a run of the model under a circuit", self.model.device)

    def _give_way(self) -> bool:
        more, self._size = self._size > 1 or bool(self._aside), max(1, self._size // 2)
        if self._parts and self._parts[0].anchors is not None:
            self._lost = self._parts[0].anchors.removed
        self._parts, self._aside, self._differences = [], [], self._differences.new_empty(0)
        return more

    def _exact_run(self, removed: BoolArray) -> Tensor:
        self._drop_anchors()
        final = torch.empty_like(self._clean.final_out)
        for part in self._parts:
            run = self._patched(part, removed, separate=True)
            with (
                record_linears(self.model) as linears,
                self._rule.exactly(self.model),
                hooks(*run.register()),
            ):
                final[part.rows] = run_to_answers(self.model, part.task, part.task.clean_ids)[0]
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

    def _run(self, removed: BoolArray) -> Tensor:
        return self._logits(self._fitting(lambda: self._one_run(removed)))

    def _one_run(self, removed: BoolArray) -> Tensor:
        """Where the model ends without some edges. [rows, d_model]"""
        final = torch.empty_like(self._clean.final_out)
        for part in self._parts:
            with ExitStack() as stack:
                if part.anchors is not None:
                    stack.enter_context(self.model.precision.mode.anchored(part.anchors.linears))
                stack.enter_context(hooks(*self._patched(part, removed).register()))
                final[part.rows] = run_to_answers(self.model, part.task, part.task.clean_ids)[0]
        return final

    def _logits(self, final: Tensor) -> Tensor:
        """Logits of hidden states after the final norm. [rows, d_model] -> [rows, vocab]"""
        with torch.no_grad(), self.model.exact_embeddings():
            return self._fitting(lambda: exact_logits(self.model, self._clean, final))

    def _value(self, logits: Tensor) -> float:
        return self._fitting(lambda: self.metric(logits))

    def _patched(self, part: _Part, removed: BoolArray, *, separate: bool = False) -> PatchedRun:
        substitute = self._ablated.part(part.examples)
        buffer = self._differences[:, : len(part.task)]
        return PatchedRun(self.model, substitute, removed, buffer, part.anchors, separate=separate)

    # -- the active component's own corrupted outputs -----------------------------------------------

    def _recompute_substitute(self, reader: int) -> None:
        """Recompute what the component in focus writes in the corrupted run, at its new precision.

        Other components' corrupted activations are constants of the run (docs/semantics.md, section 5).
        """
        self._undo_substitute()
        if not self._fixed and self.graph.readers[reader].nodes:
            self._replace_substitute(reader)
        self._ablated = with_streams(self.model, self.substitute)

    def _replace_substitute(self, reader: int) -> None:
        number = self.graph.readers[reader].layer
        layer, corrupted = self.model.layers[number], self.corrupted
        with torch.no_grad():
            if self.graph.readers[reader].kind == "mlp":
                values = layer.mlp(layer.mlp_norm(corrupted.mlp_in[number]))
                store = self.substitute.mlp
            else:
                values = written_heads(layer, corrupted, number)
                store = self.substitute.z
        self._restore.append((store, number, store[number]))
        store[number] = values

    def _undo_substitute(self) -> None:
        while self._restore:
            store, number, values = self._restore.pop()
            store[number] = values


def _parts(task: Task, size: int, device: torch.device) -> list[_Part]:
    """The task cut into runs of at most so many examples."""
    found = []
    for first in range(0, len(task), size):
        examples = slice(first, min(first + size, len(task)))
        part, rows = task.part(examples.start, examples.stop)
        found.append(_Part(part, rows.to(device), examples))
    return found
