"""The hooks engine: the Hugging Face model itself, with forward hooks, for any edge set.

It is slow and simple: one whole forward pass per circuit. It serves evaluation, families the sparse
engine cannot cut, and it is the referee of the sparse engine in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import exact_logits
from pahq_hf.capture.store import ActivationStore
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.config import Ablation, EngineName
from pahq_hf.engine.hooks.passes import Passes
from pahq_hf.engine.hooks.raised import RaisedSubstitute
from pahq_hf.engine.one_by_one import change_each
from pahq_hf.engine.phases import Phases
from pahq_hf.engine.protocol import Slopes, Trial
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.session import Session, in_session
from pahq_hf.engine.task_runs import TaskRuns
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import checked

T = TypeVar("T")


class HooksEngine:
    """Metric and logits of any circuit, by running the Hugging Face model with patched readers.

    Args:
        model: The patched model.
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
        self.session = Session(model, self._rule)
        with self.session():
            runs = TaskRuns.of(model, task, metric, ablation, self._rule, store)
        clean, self.corrupted, self.substitute = runs.clean, runs.corrupted, runs.substitute
        self.metric, self.clean_logits = runs.metric, clean.logits
        self._clean = Activations(logits=clean.logits, final_out=clean.final_out)  # the rest may go
        self._removed = self.graph.no_edges()
        self._raised = RaisedSubstitute(model, self.corrupted, self.substitute, fixed=ablation != "corrupted")
        self._passes = Passes(model, task, self._rule, clean, self.substitute)
        self.evaluations = 0
        self.phases = Phases()
        self._reader: int | None = None  # in focus

    # -- any circuit ------------------------------------------------------------------------------

    @in_session
    def logits(self, kept: BoolArray) -> Tensor:
        """Logits of a circuit at the answer positions, exact in how they differ from the full model's.

        Args:
            kept: Its edges. [readers, writers]

        Returns:
            [rows, vocab] in float64
        """
        if self._rule.raise_active and not self._rule.anchored:
            self._unraise()  # a circuit's value does not depend on who is in focus
        with self._passes.without_anchors(), self._rule.exactly(self.model):
            return self._run(self.graph.all_edges & ~kept)

    @in_session
    def metric_of(self, kept: BoolArray) -> float:
        """The minimised metric of a circuit."""
        self.evaluations += 1
        return self._value(self.logits(kept))

    def drop_each(self, kept: BoolArray, edges: BoolArray | None = None) -> NDArray[np.float64]:
        """What removing each edge of a circuit alone adds to the metric, one whole run for each.

        Args:
            kept: The circuit. [readers, writers]
            edges: Which of its edges are asked for; all by default. [readers, writers]

        Returns:
            m(C without the edge) - m(C), 0 elsewhere. [readers, writers]
        """
        return change_each(self.metric_of, kept, kept if edges is None else edges)

    def add_each(self, kept: BoolArray, absent: BoolArray) -> NDArray[np.float64]:
        """What adding each of some edges alone to a circuit adds to the metric, one whole run for each.

        Args:
            kept: The circuit. [readers, writers]
            absent: Edges that are not in it. [readers, writers]

        Returns:
            m(C with the edge) - m(C), 0 elsewhere. [readers, writers]
        """
        return change_each(self.metric_of, kept, absent)

    # -- the current circuit ------------------------------------------------------------------------

    @in_session
    def begin(self, kept: BoolArray) -> float:
        """Make an edge set the current circuit; its metric."""
        self._unraise()  # what is raised depends on the reader that comes into focus next
        self._removed = self.graph.all_edges & ~kept
        return self._measure_exactly() if self._rule.anchored else self._measure(self._removed)

    @in_session
    def focus(self, reader: int) -> float | None:
        """Turn to a reader; the metric measured again when that changed what tests start from."""
        self._reader = reader
        if not self._rule.raise_active:
            return None
        names = [self.graph.writers[node].name for node in self.graph.readers[reader].nodes]
        changed = self._passes.fitting(lambda: self.model.precision.activate(*names))
        if self._rule.anchored:
            return self._measure_exactly()
        if not changed:
            return None
        self._passes.use(self._passes.fitting(lambda: self._raised.recompute(reader)))
        return self._measure(self._removed)

    @in_session
    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Metric with exactly each candidate's edges into `reader` gone."""
        if reader != self._reader:
            self.focus(reader)
        return Trial.of(reader, candidates, [self._measure(self._without(reader, c)) for c in candidates])

    @in_session
    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """The same in FP32."""
        if reader != self._reader:
            self.focus(reader)
        with self._passes.without_anchors(), self.model.precision.full_precision():
            values = [self._measure(self._without(reader, writers)) for writers in candidates]
        return Trial.of(reader, candidates, values)

    @in_session
    def slopes(self, reader: int, candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Slopes:
        """How the metric moves, to first order, as edges into a reader go; two runs for each candidate."""
        self.metric.check_gradient()
        if reader != self._reader:
            self.focus(reader)
        values, effects = [], np.zeros((len(candidates), len(writers)))
        sizes = np.zeros(len(writers))
        for number, gone in enumerate(candidates):
            self.evaluations += 1
            removed = self._without(reader, gone)
            value, gradient = self._followed(self._passes.run(removed))
            values.append(value)
            effects[number], sizes[:] = self._passes.effects(removed, reader, writers, gradient)
        return Slopes(Trial.of(reader, candidates, values), tuple(writers), effects, sizes)

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
        """Free what can be made again."""
        self.session.end()
        self._lose_focus()

    def _unraise(self) -> None:
        """Go back to where no reader is in focus."""
        self.model.precision.deactivate()
        self._lose_focus()

    def _lose_focus(self) -> None:
        self._reader = None
        self._raised.undo()
        self._passes.use(self.substitute)
        self._passes.drop_anchors()

    # -- one run ----------------------------------------------------------------------------------

    def _measure(self, removed: BoolArray) -> float:
        self.evaluations += 1
        return self._value(self._run(removed))

    def _measure_exactly(self) -> float:
        """Run the current circuit in FP32 and take it as the anchor of what follows."""
        self.evaluations += 1
        return self._value(self._logits(self._passes.anchor(self._removed)))

    def _run(self, removed: BoolArray) -> Tensor:
        return self._logits(self._passes.run(removed))

    def _logits(self, final: Tensor) -> Tensor:
        """Logits of hidden states after the final norm. [rows, d_model] -> [rows, vocab]"""
        with torch.no_grad(), self.model.exact_embeddings():
            return self._passes.fitting(lambda: exact_logits(self.model, self._clean, final))

    def _value(self, logits: Tensor) -> float:
        return self._passes.fitting(lambda: self.metric(logits))

    def _followed(self, final: Tensor) -> tuple[float, Tensor]:
        """The metric of hidden states after the final norm, and its gradient. [rows, d_model]"""

        def follow() -> tuple[float, Tensor]:
            with torch.enable_grad(), self.model.exact_embeddings():
                at = final.detach().requires_grad_()
                value = self.metric.followed(exact_logits(self.model, self._clean, at))
                (gradient,) = torch.autograd.grad(value, at)
            return checked(float(value.detach()), self.metric.name), gradient

        return self._passes.fitting(follow)
