"""The captured runs of a task, what removing edges would change, and micro-batches of both."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.circuit.graph import Graph
from pahq_hf.config import Ablation
from pahq_hf.engine.backward_rules import DERIVATIVE, BackwardRules
from pahq_hf.engine.hooks.circuit_gradients import circuit_gradients
from pahq_hf.engine.hooks.gradients import ReaderGradients, Shift, reader_gradients
from pahq_hf.engine.protocol import Part
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.session import Session, in_session
from pahq_hf.engine.task_runs import TaskRuns
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import Metric

_BACKWARD_BYTES = 128 << 20  # of what one forward pass keeps for its backward pass
_CIRCUIT_BYTES = 1 << 30  # the same where readers read of a circuit, each by itself
_DIFFERENCE_BYTES = 64 << 20  # of what writers write at some tokens


class Runs:
    """The clean, corrupted and substituted runs of a task.

    In precision `pahq` runs and forward passes are exact, FP32 streamed from the checkpoint, and backward
    passes run through the low-precision weights: what they get wrong is relative to the effect of an edge. In
    `rtn` and `pahq-literal`, where nothing is exact, both are low.

    Args:
        model: The patched model.
        task: The prompts.
        metric: What is minimised.
        ablation: What stands in for removed edges.
        rule: How low precision is used.

    Raises:
        TaskError: If the prompts do not fit the model.
        MetricError: If the task lacks what the metric needs, or the metric is NaN.
    """

    def __init__(
        self, model: PatchedModel, task: Task, metric: str, ablation: Ablation, rule: RegimeRule
    ) -> None:
        self.model = model
        self.graph: Graph = model.graph
        self._task = task
        self._rule = rule
        self.session = Session(model, rule)
        with self.session():
            runs = TaskRuns.of(model, task, metric, ablation, rule)
        self.clean, self.corrupted, self.substitute = runs.clean, runs.corrupted, runs.substitute
        self.metric = runs.metric

    def parts(self, most: int | None = None) -> Iterator[Part]:
        """The task in runs of as many examples as memory allows.

        Args:
            most: At most so many.
        """
        yield from self._in_parts(_BACKWARD_BYTES, self._bytes_per_token(), most)

    def circuit_parts(self, most: int | None = None) -> Iterator[Part]:
        """The task in runs of as many examples as memory allows where gradients are taken at a circuit.

        Args:
            most: At most so many.
        """
        yield from self._in_parts(_CIRCUIT_BYTES, self._bytes_per_token() + self._bytes_of_readers(), most)

    @property
    def nbytes(self) -> int:
        """What the runs take in memory."""
        runs = {id(run): run.nbytes for run in (self.clean, self.corrupted, self.substitute)}
        return sum(runs.values())

    def lighten(self) -> None:
        """Forget what gradients at circuits do not need: of the clean and corrupted runs all but logits."""
        self.clean = Activations(embedding=self.clean.embedding, logits=self.clean.logits)
        self.corrupted = Activations(logits=self.corrupted.logits)

    def _in_parts(self, room: int, per_token: int, most: int | None = None) -> Iterator[Part]:
        size = max(1, room // (per_token * self._task.length))
        size = min(size, most or size)
        for first in range(0, len(self._task), size):
            last = min(first + size, len(self._task))
            task, rows = self._task.part(first, last)
            reference = self.clean.logits[rows.to(self.clean.logits.device)]
            metric = Metric(self.metric.name, task, reference, self.model.device)
            metric.row_weights *= len(task) / len(self._task)
            real = task.attention_mask.flatten().nonzero().flatten().to(self.model.device)
            yield Part(task, slice(first, last), metric, real, metric(reference))

    def _bytes_per_token(self) -> int:
        """About what a token's activations take until the backward pass."""
        width, layers = int(self.clean.embedding.shape[-1]), len(self.model.layers)
        linears = self.model.linears()
        outputs = sum(linear.out_features + linear.in_features for linear in linears)
        patterns = 3 * layers * self.graph.spec.heads * self._task.length
        return int(self.clean.embedding.element_size()) * (2 * outputs + 6 * layers * width + patterns)

    def _bytes_of_readers(self) -> int:
        """About what readers of a circuit read, each by itself, and what is written for them, at a token."""
        tensors = 4 * len(self.graph.readers) + 2 * len(self.graph.writers)
        return int(self.clean.embedding.element_size() * self.clean.embedding.shape[-1]) * tensors

    def at_circuit(self, part: Part, shares: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """A part's metric where each edge has a share, and what removing each edge would add to it.

        Args:
            part: The part.
            shares: 1 where an edge is kept, 0 where it is gone. [readers, writers], or of each example its
                own: [batch, readers, writers]

        Returns:
            The part's share of the metric, and of what removing each edge adds to it if all is linear, gone
            or not: shaped as `shares`, each example's by itself where each has its own.

        Raises:
            MetricError: If the metric has no gradient, or is NaN there.
        """
        part.metric.check_gradient()
        other, forward = self.substitute.part(part.examples), self._rule.exactly(self.model)
        return circuit_gradients(self.model, part.task, part.metric, other, shares, self.session, forward)

    def gradients(self, part: Part, embedding: Tensor, rules: BackwardRules = DERIVATIVE) -> ReaderGradients:
        """Gradients of a part's metric where the `input` writer writes something of its own.

        Args:
            part: The part.
            embedding: What it writes. [batch, pos, d_model]
            rules: Where the backward pass departs from the derivative.
        """
        forward = self._rule.exactly(self.model)
        return reader_gradients(
            self.model, part.task, part.metric, embedding, self.session, forward, rules=rules
        )

    def gradients_beside(self, part: Part, writers: range, share: float) -> ReaderGradients:
        """Gradients of a part's metric in the clean run, but for some writers.

        Args:
            part: The part.
            writers: `input`, all heads of a layer, or an MLP, which write `a_w + share (c_w - a_w)`.
            share: How far they are from the clean run.
        """
        embedding = self.clean.embedding[part.examples]
        change = torch.zeros_like(embedding)
        for tokens, differences in self.chunks(part, writers):
            change.flatten(0, 1)[tokens] = share * differences.sum(0)
        first, forward = self.graph.writers[writers.start], self._rule.exactly(self.model)
        if first.is_input:
            return self.gradients(part, embedding + change)
        shift = Shift(first.layer, first.head is not None, change)
        return reader_gradients(
            self.model, part.task, part.metric, embedding, self.session, forward, shift=shift
        )

    def chunks(self, part: Part, writers: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Real tokens of a part, as many at once as memory allows, and what edges would carry instead there.

        Args:
            part: The part.
            writers: Whose edges: `input`, or all heads of a layer, or an MLP; all by default.

        Yields:
            Indices into the flattened batch [tokens], and `c_w - a_w` of these writers, exact where runs are.
            [writer, tokens, d_model]
        """
        some = range(len(self.graph.writers)) if writers is None else writers
        width = self.clean.embedding.shape[-1]
        per_token = len(some) * width * self.clean.embedding.element_size()
        for tokens in part.real.split(max(1, _DIFFERENCE_BYTES // per_token)):
            yield tokens, self._differences(part.examples, tokens, some)

    @in_session
    @torch.no_grad()
    def _differences(self, examples: slice, tokens: Tensor, writers: range) -> Tensor:
        clean, other = self.clean, self.substitute

        def change(new: Tensor, old: Tensor) -> Tensor:
            return new[examples].flatten(0, 1)[tokens] - old[examples].flatten(0, 1)[tokens]

        width = clean.embedding.shape[-1]
        out = clean.embedding.new_empty(len(writers), len(tokens), width)
        if 0 in writers:
            out[writers.index(0)] = change(other.embedding, clean.embedding)
        with self._rule.exactly(self.model):
            for number, layer in enumerate(self.model.layers):
                attention, head = layer.attention, self.graph.head_writer(number, 0)
                if head in writers:
                    start = writers.index(head)
                    z = change(other.z[number], clean.z[number])
                    out[start : start + attention.n_heads] = attention.contributions(z).transpose(0, 1)
                if self.graph.spec.mlps and self.graph.mlp_writer(number) in writers:
                    mlp = change(other.mlp[number], clean.mlp[number])
                    out[writers.index(self.graph.mlp_writer(number))] = mlp
        return out
