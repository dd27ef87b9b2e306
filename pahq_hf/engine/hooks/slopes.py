"""Gradients at one reader of a circuit: how the metric moves, to first order, as edges into it go.

A probe that is zero is added to what the reader reads, and one backward pass gives its gradient. What was
written before it, and so what edges into the reader carry, does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import followed_to_answers
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.hooks.patched_run import PatchedRun, RunAnchors
from pahq_hf.modeling.hooks import hooks
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.anchors import Anchor, Origin
from pahq_hf.tasks.base import Task


class ProbedRun(PatchedRun):
    """A patched run that is followed backwards to what one reader reads.

    Args:
        model: The patched model, at the precision that forward and backward pass compute in.
        substitute: What stands in for removed edges.
        removed: Edges that are gone. [readers, writers]
        differences: Room for `a_w - c_w`. [writers, batch, pos, d_model]
        anchors: The exact run it starts from, if it starts from one.
        reader: The reader.
    """

    def __init__(
        self,
        model: PatchedModel,
        substitute: Activations,
        removed: BoolArray,
        differences: Tensor,
        anchors: RunAnchors | None,
        reader: int,
    ) -> None:
        super().__init__(model, substitute, removed, differences, anchors)
        self._reader = reader
        self._probe = torch.zeros_like(substitute.embedding).requires_grad_()
        # What depends on the probe, by its first writer: other runs use the room for differences again, where
        # nothing that holds on to this run may stay. [writer, batch, pos, d_model]
        self._after: dict[int, Tensor] = {}

    def effects(self, task: Task, writers: Sequence[int], gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Run forwards and backwards: what removing each edge into the reader adds if all is linear.

        Args:
            task: The examples.
            writers: Writers of the edges.
            gradient: Of what is minimised, with respect to where the model ends. [rows, d_model]

        Returns:
            That, and the squared length of what each edge carries. Both [writers] in float64
        """
        linears = {} if self._anchors is None else self._anchors.linears
        # Origins remember the last input they met, and with it all it came from: these go with the run.
        own = {linear: Anchor(Origin(anchor.x), anchor.y) for linear, anchor in linears.items()}
        with (
            torch.enable_grad(),
            self._model.precision.mode.anchored(own),
            hooks(*self.register()),
        ):
            final = followed_to_answers(self._model, task, task.clean_ids)[0]
            (slope,) = torch.autograd.grad(final, self._probe, gradient)
        slope = slope.double()
        found, squares = [], []
        for writer in writers:
            carried = self._carried(writer).detach().double()
            found.append(-float((slope * carried).sum()))
            squares.append(float(carried.square().sum()))
        return torch.tensor(found, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)

    def _carried(self, writer: int) -> Tensor:
        """What the writer's edge into the reader carries when it is tested. [batch, pos, d_model]"""
        assert writer < self._graph.prefix[self._reader], "there is no such edge"
        low = self._low_difference(writer)
        return self._differences[writer] if low is None else low

    def _streams(self, readers: range, stream: Tensor, ablated: Tensor) -> Tensor | None:
        streams = super()._streams(readers, stream, ablated)
        if self._reader not in readers:
            return streams
        mine = torch.arange(readers.start, readers.stop, device=stream.device) == self._reader
        probe = mine[:, None, None, None] * self._probe
        return probe + (stream if streams is None else streams)

    def _put(self, writers: slice, differences: Tensor) -> None:
        if differences.requires_grad:
            self._after[writers.start] = differences
        else:
            super()._put(writers, differences)

    def _of(self, writers: NDArray[np.intp]) -> Tensor:
        parts, done = [], 0
        for start, differences in sorted(self._after.items(), key=lambda item: item[0]):
            first, last = np.searchsorted(writers, (start, start + len(differences)))
            own = torch.from_numpy(writers[first:last] - start).to(differences.device)
            parts += [super()._of(writers[done:first]), differences[own]]
            done = last
        return torch.cat([*parts, super()._of(writers[done:])])
