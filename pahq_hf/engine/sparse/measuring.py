"""Metrics of circuits that differ from a state in what one reader reads, side by side in memory.

From the change of the reader's input to the final stream (`propagation`), and from there to the metric
(`readout`). When memory runs out, batches are halved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pahq_hf.engine.phases import Phases
from pahq_hf.engine.sparse.arithmetic import Arithmetic
from pahq_hf.engine.sparse.budget import MemoryBudget
from pahq_hf.engine.sparse.buffers import Buffers, NoBuffers
from pahq_hf.engine.sparse.propagation import Propagation
from pahq_hf.engine.sparse.readout import Readout
from pahq_hf.engine.sparse.state import CircuitState
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.device_memory import out_of_memory
from pahq_hf.tasks.metrics import Metric, checked


class Measuring:
    """Measures circuits.

    Args:
        model: The patched model.
        metric: What is minimised.
        readout: The metric of final streams.
        memory: Bounds batches.
        buffers: Room for a batch on its way up.
        phases: Where seconds are added up.

    Attributes:
        evaluations: Metric values so far.
    """

    def __init__(
        self,
        model: PatchedModel,
        metric: Metric,
        readout: Readout,
        memory: MemoryBudget,
        buffers: Buffers,
        phases: Phases,
    ) -> None:
        self._model = model
        self._metric = metric
        self._readout = readout
        self._memory = memory
        self._buffers = buffers
        self._phases = phases
        self.evaluations = 0

    def give_way(self) -> bool:
        """After memory ran out: read metrics with less at once. False if it was the least already."""
        return self._readout.give_way()

    def metric_of(self, state: CircuitState) -> float:
        """The metric of a state itself."""
        return self._read(state.inputs[state.graph.logits_reader][None])[0]

    def metrics(
        self, state: CircuitState, reader: int, delta: Tensor, arithmetic: Arithmetic, held: int = 0
    ) -> list[float]:
        """Metrics after changes of a reader's input.

        Args:
            state: What they are changes of.
            reader: The reader.
            delta: Changes at its tokens. [K, tokens, d_model]
            arithmetic: How changes are computed.
            held: Bytes of what made the changes, which stay.

        Returns:
            K values.
        """
        finals: list[Tensor] = []
        done, held = 0, delta.nbytes + held
        while done < delta.shape[0]:
            size = self._memory.batch(state, reader, held)
            try:
                finals.append(self._final(state, reader, delta[done : done + size], arithmetic))
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error) or not self._memory.halve(size):
                    raise
            else:
                done += size
                continue
            self._buffers.clear()  # only here the failed batch has let go of what it had made
        return self._read(torch.cat(finals))

    def followed(
        self, state: CircuitState, reader: int, delta: Tensor, arithmetic: Arithmetic
    ) -> tuple[list[float], Tensor]:
        """Metrics after changes of a reader's input, and their gradients with respect to it.

        Args:
            state: What they are changes of.
            reader: The reader.
            delta: Changes at its tokens, as many as fit with what a backward pass needs.
                [K, tokens, d_model]
            arithmetic: How changes are computed.

        Returns:
            K values, and gradients. [K, tokens, d_model]

        Raises:
            MetricError: If the metric has no gradient.
        """
        self.evaluations += delta.shape[0]
        with torch.enable_grad():
            at = delta.detach().clone().requires_grad_()
            with self._phases("propagation"):
                final = Propagation(state, reader, at, arithmetic, NoBuffers()).final()
            with self._phases("metric"):
                values = self._readout(self._model.final_norm(final))
        if not final.requires_grad:  # nothing that reads the node reaches the metric
            return self._checked(values), torch.zeros_like(delta)
        self._metric.check_followed(values)
        with self._phases("backward"), self._model.exact_embeddings():  # as forwards
            (gradient,) = torch.autograd.grad(values, at, torch.ones_like(values))
        return self._checked(values.detach()), gradient

    def _final(self, state: CircuitState, reader: int, delta: Tensor, arithmetic: Arithmetic) -> Tensor:
        """The stream the final norm reads. [K, tokens, d_model] -> [K, rows, d_model]"""
        with self._phases("propagation"):
            return Propagation(state, reader, delta, arithmetic, self._buffers).final()

    def _read(self, final: Tensor) -> list[float]:
        """Metrics of final streams. [K, rows, d_model] -> K values"""
        self.evaluations += final.shape[0]
        with self._phases("metric"):
            return self._checked(self._readout(self._model.final_norm(final)))

    def _checked(self, values: Tensor) -> list[float]:
        return [checked(value, self._metric.name) for value in values.tolist()]
