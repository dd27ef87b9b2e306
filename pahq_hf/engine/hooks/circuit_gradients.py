"""Gradients at a circuit: how a metric moves, to first order, as any edge of the graph goes or comes back.

A circuit may be soft here: each edge has a share, 1 where it is kept and 0 where it is gone, and a reader
reads what stands in for everything plus the shares of `a_w - c_w` (docs/semantics.md, section 2). The
gradient in the share of edge (w, r) is `∂m/∂input_r · (a_w - c_w)`, of edges that are gone as well. Each
example may have a circuit of its own.

All readers' inputs depend on what nearly all writers write. So that memory does not grow with the number of
edges, what is written is one buffer, and so are the gradients of what is read: a reader takes from the first
on the way forwards and fills its rows of the second on the way back, where a writer's gradient is what its
edges add up of the rows above it. Autograd knows nothing of the buffers, but a chain of tokens through all
readers and writers makes it go back in exactly the order in which it came. Edges without a share cost
nothing, and where no gradient arrives, since nothing that reads a node reaches the metric, none is followed
any farther.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
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


class _Streams:
    """What writers write in one pass, and the gradients of what readers read.

    Args:
        written: `a_w - c_w` of writers. [writers, batch, pos, d_model]
        shares: Of each edge. [readers, writers], or of each example its own: [batch, readers, writers]
    """

    def __init__(self, written: Tensor, shares: NDArray[np.float64]) -> None:
        self._written = written
        count = shares.shape[-2]
        self._gradients = written.new_empty(count, *written.shape[1:])  # [readers, batch, pos, d_model]
        self._arrived = np.zeros(count, dtype=bool)  # readers that the metric depends on
        self._used = (shares != 0).reshape(-1, *shares.shape[-2:]).any(axis=0)  # [readers, writers]
        self._shares = torch.from_numpy(shares).to(written)
        self._is_each = shares.ndim == 3

    def write(self, writers: slice, differences: Tensor) -> None:
        """Note down what consecutive writers write. [writer, batch, pos, d_model]"""
        self._written[writers] = differences

    def read(self, readers: slice) -> Tensor:
        """What the edges of consecutive readers add up to. [reader, batch, pos, d_model]"""
        writers = _places(self._used[readers].any(axis=0))
        seen = _of(self._written, writers)
        if self._is_each:
            own = _of(self._shares[:, readers].movedim(2, 0), writers)  # [writer, batch, reader]
            return torch.einsum("wbr,wbpd->rbpd", own, seen)
        total = _of(self._shares[readers].T, writers).T @ seen.flatten(1)
        return total.unflatten(1, seen.shape[1:])

    def arrive(self, readers: slice, gradients: Tensor) -> None:
        """Note down the gradients of what consecutive readers read. [reader, batch, pos, d_model]"""
        self._gradients[readers] = gradients
        self._arrived[readers] = True

    def gradients_of(self, writers: slice) -> Tensor | None:
        """The gradients of what consecutive writers wrote; None where they are all zero.

        Returns:
            [writer, batch, pos, d_model]
        """
        rows = self._used[:, writers].any(axis=1) & self._arrived
        if not rows.any():
            return None
        readers = _places(rows)
        if self._is_each:
            own = _of(self._shares[..., writers].movedim(1, 0), readers)  # [reader, batch, writer]
            return torch.einsum("rbw,rbpd->wbpd", own, _of(self._gradients, readers))
        total = _of(self._shares[:, writers], readers).T @ _of(self._gradients, readers).flatten(1)
        return total.unflatten(1, self._gradients.shape[1:])

    def effects(self) -> NDArray[np.float64]:
        """What removing each edge would add to the metric if all were linear; anything where there is none.

        Returns:
            [readers, writers], or of each example its own: [batch, readers, writers]
        """
        found = np.zeros(self._shares.shape)
        if self._arrived.any():
            gradients = _of(self._gradients, _places(self._arrived))
            if self._is_each:
                total = torch.einsum("rbpd,wbpd->brw", gradients, self._written)
            else:
                total = gradients.flatten(1) @ self._written.flatten(1).T
            found[..., self._arrived, :] = -total.double().cpu().numpy()
        return found


def _places(chosen: NDArray[np.bool_]) -> slice | NDArray[np.intp]:
    """Where something is so: a slice if it is everywhere in between."""
    found = np.flatnonzero(chosen)
    if len(found) and found[-1] - found[0] + 1 > len(found):
        return found
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _of(rows: Tensor, places: slice | NDArray[np.intp]) -> Tensor:
    """Some rows, copied only where they are not consecutive."""
    return rows[places] if isinstance(places, slice) else rows[torch.from_numpy(places).to(rows.device)]


class _Write(torch.autograd.Function):
    """Writers write into the buffer; the gradient of what they wrote is what readers have added up."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, differences: Tensor, streams: _Streams, writers: slice) -> Tensor:
        ctx.streams, ctx.writers = streams, writers
        streams.write(writers, differences)
        return token.clone()

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        return token, ctx.streams.gradients_of(ctx.writers), None, None


class _Read(torch.autograd.Function):
    """Readers read from the buffer, and leave the gradients of what they read."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, ablated: Tensor, streams: _Streams, readers: slice
    ) -> tuple[Tensor, Tensor]:
        ctx.streams, ctx.readers = streams, readers
        ctx.set_materialize_grads(False)
        return ablated + streams.read(readers), token.clone()

    @staticmethod
    def backward(ctx: Any, gradients: Tensor | None, token: Tensor) -> tuple[Any, ...]:
        if gradients is not None:
            ctx.streams.arrive(ctx.readers, gradients)
        return token, None, None, None


class SoftRun(PatchedRun):
    """One forward pass in which each edge has a share, that can be followed backwards to all of them.

    Args:
        model: The patched model.
        substitute: What stands in for removed edges, of the examples of the pass.
        shares: Of each edge. [readers, writers], or of each example its own: [batch, readers, writers]
    """

    def __init__(self, model: PatchedModel, substitute: Activations, shares: NDArray[np.float64]) -> None:
        graph, embedding = model.graph, substitute.embedding
        room = embedding.new_zeros(len(graph.writers), *embedding.shape)
        super().__init__(model, substitute, graph.no_edges(), room)
        self._buffers = _Streams(room, shares)
        self._start = embedding.new_zeros(()).requires_grad_()
        self._token = self._start
        self._heads: dict[int, Tensor] = {}  # what heads of the present layer read, by their first reader

    def effects(self, value: Tensor) -> NDArray[np.float64]:
        """Follow a metric of the pass backwards. Once only.

        Args:
            value: The metric.

        Returns:
            What removing each edge would add to it if all were linear, shaped as its shares.
        """
        torch.autograd.grad(value, self._start)
        return np.where(self._graph.all_edges, self._buffers.effects(), 0.0)

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
        streams: Tensor
        rows = slice(readers.start, readers.stop)
        streams, self._token = _Read.apply(self._token, ablated, self._buffers, rows)
        return streams

    def _put(self, writers: slice, differences: Tensor) -> None:
        self._token = _Write.apply(self._token, differences, self._buffers, writers)


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
        shares: Of each edge, 1 where it is kept and 0 where it is gone. [readers, writers], or of each
            example its own: [batch, readers, writers]
        session: Puts the model into the precision that gradients run through.
        forward: The precision of the forward pass.

    Returns:
        The metric, and what removing each edge would add to it if all were linear: of an edge that is gone
        what removing it once more would. It is shaped as the shares, each example's part by itself where each
        has its own.
    """
    run = SoftRun(model, substitute, shares)
    with session(), model.exact_embeddings(), torch.enable_grad():
        with forward, hooks(*run.register()):
            logits = forward_to_answers(model, part, part.clean_ids)
        value = metric.followed(logits)
        effects = run.effects(value)
    return checked(float(value.detach()), metric.name), effects
