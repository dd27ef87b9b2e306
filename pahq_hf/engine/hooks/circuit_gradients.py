"""Gradients at a circuit: how a metric moves, to first order, as any edge of the graph goes or comes back.

A circuit may be soft here: each edge has a share, 1 where it is kept and 0 where it is gone, and a reader
reads what stands in for everything plus the shares of `a_w - c_w` (docs/semantics.md, section 2). The
gradient in the share of edge (w, r) is `∂m/∂input_r · (a_w - c_w)`, of edges that are gone as well.

All readers' inputs depend on what nearly all writers write. So that memory does not grow with the number of
edges, what is written is one buffer, and so is the gradient of it: a reader takes from the first on the way
forwards, and adds to the second on the way back. Autograd knows nothing of the buffers, but a chain of tokens
through all readers and writers makes it go back in exactly the order in which it came.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import forward_to_answers
from pahq_hf.engine.hooks.gradients import HEAD_KINDS
from pahq_hf.engine.hooks.patched_run import PatchedRun
from pahq_hf.engine.session import Session
from pahq_hf.modeling.hooks import hooks
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import Metric, checked


@dataclass
class _Written:
    """What writers write in one pass, and what comes back to them.

    Attributes:
        differences: `a_w - c_w`. [writers, batch, pos, d_model]
        gradients: Of the metric in them, added up over the readers so far. [writers, batch, pos, d_model]
        effects: What removing each edge would add to the metric if all were linear. [readers, writers]
    """

    differences: Tensor
    gradients: Tensor
    effects: NDArray[np.float64]


class _Write(torch.autograd.Function):
    """Writers write into the buffer; the gradient of what they wrote is what readers have added up."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, differences: Tensor, written: _Written, writers: slice) -> Tensor:
        ctx.written, ctx.writers = written, writers
        written.differences[writers] = differences
        return token.clone()

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return token, ctx.written.gradients[ctx.writers], None, None


class _Read(torch.autograd.Function):
    """Readers read from the buffer, and add their gradients to those of what they read."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, ablated: Tensor, written: _Written, readers: range, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.written, ctx.readers, ctx.shares = written, readers, shares  # shares: [reader, writers seen]
        seen = written.differences[: shares.shape[1]]
        return ablated + torch.einsum("rw,wbpd->rbpd", shares, seen), token.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, token: Tensor) -> tuple[Any, ...]:
        written, readers, shares = ctx.written, ctx.readers, ctx.shares
        seen = shares.shape[1]
        written.gradients[:seen] += torch.einsum("rw,rbpd->wbpd", shares, gradient)
        effects = gradient.flatten(1) @ written.differences[:seen].flatten(1).T
        written.effects[readers.start : readers.stop, :seen] = -effects.double().cpu().numpy()
        return token, None, None, None, None


class SoftRun(PatchedRun):
    """One forward pass in which each edge has a share, that can be followed backwards to all of them.

    Args:
        model: The patched model.
        substitute: What stands in for removed edges, of the examples of the pass.
        shares: Of each edge. [readers, writers]
    """

    def __init__(self, model: PatchedModel, substitute: Activations, shares: NDArray[np.float64]) -> None:
        graph, embedding = model.graph, substitute.embedding
        room = embedding.new_zeros(len(graph.writers), *embedding.shape)
        super().__init__(model, substitute, graph.no_edges(), room)
        self._shares = torch.from_numpy(shares).to(embedding)
        self._written = _Written(room, torch.zeros_like(room), np.zeros(shares.shape))
        self._start = embedding.new_zeros(()).requires_grad_()
        self._token = self._start
        self._heads: dict[int, Tensor] = {}  # what heads of the present layer read, by their first reader

    def effects(self, value: Tensor) -> NDArray[np.float64]:
        """Follow a metric of the pass backwards. Once only.

        Args:
            value: The metric.

        Returns:
            What removing each edge would add to it if all were linear. [readers, writers]
        """
        torch.autograd.grad(value, self._start)
        return self._written.effects

    def _streams(self, readers: range, stream: Tensor, ablated: Tensor) -> Tensor:
        if self._graph.readers[readers.start].kind not in HEAD_KINDS:
            return self._read(readers, ablated)
        if readers.start not in self._heads:  # in one go through what is written, for all of a layer's heads
            layer = self._graph.readers[readers.start].layer
            kinds = [self._graph.layer_readers(layer, kind) for kind in HEAD_KINDS]
            first, last = min(kind.start for kind in kinds), max(kind.stop for kind in kinds)
            whole = self._read(range(first, last), ablated)
            self._heads = {kind.start: whole[kind.start - first : kind.stop - first] for kind in kinds}
        return self._heads[readers.start]

    def _read(self, readers: range, ablated: Tensor) -> Tensor:
        seen = int(self._graph.prefix[readers.start])
        shares = self._shares[readers.start : readers.stop, :seen]
        streams: Tensor
        streams, self._token = _Read.apply(self._token, ablated, self._written, readers, shares)
        return streams

    def _put(self, writers: slice, differences: Tensor) -> None:
        self._token = _Write.apply(self._token, differences, self._written, writers)


def circuit_gradients(
    model: PatchedModel,
    part: Task,
    metric: Metric,
    substitute: Activations,
    shares: NDArray[np.float64],
    session: Session,
    forward: AbstractContextManager[None],
) -> tuple[float, NDArray[np.float64]]:
    """The metric of a circuit on some examples, and how it moves as edges go.

    Args:
        model: The patched model.
        part: The examples.
        metric: The metric of these examples.
        substitute: What stands in for removed edges.
        shares: Of each edge, 1 where it is kept and 0 where it is gone. [readers, writers]
        session: Puts the model into the precision that gradients run through.
        forward: The precision of the forward pass.

    Returns:
        The metric, and what removing each edge would add to it if all were linear: of an edge that is gone
        what removing it once more would. [readers, writers]
    """
    run = SoftRun(model, substitute, shares)
    with session(), model.exact_embeddings(), torch.enable_grad():
        with forward, hooks(*run.register()):
            logits = forward_to_answers(model, part, part.clean_ids)
        value = metric.followed(logits)
        effects = run.effects(value)
    return checked(float(value.detach()), metric.name), effects
