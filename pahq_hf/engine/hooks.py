"""The hooks engine: the Hugging Face model itself, with forward hooks, for any edge set.

It is slow and simple: one whole forward pass per circuit. It serves evaluation, families the sparse
engine cannot cut, and it is the referee of the sparse engine in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pahq_hf.capture import Activations, ablated, answer_logits, capture, first_input, hooks
from pahq_hf.config import Ablation, MetricName
from pahq_hf.graph import BoolArray, Graph
from pahq_hf.metrics import Metric
from pahq_hf.patch import Layer, PatchedModel
from pahq_hf.tasks.base import Task


class HooksEngine:
    """Metric and logits of any circuit, by running the Hugging Face model with patched readers.

    Args:
        model: The patched model. Its precision at construction is the one of the captured runs.
        task: The prompts.
        metric: What to minimise.
        ablation: What stands in for removed edges.
        raise_active: Compute the node of the reader in focus in FP32 (the paper's rule).
    """

    def __init__(
        self,
        model: PatchedModel,
        task: Task,
        metric: MetricName,
        *,
        ablation: Ablation = "corrupted",
        raise_active: bool = False,
    ) -> None:
        self.model = model
        self.task = task
        self.graph: Graph = model.graph
        clean = capture(model, task, task.clean_ids)
        self._corrupted = capture(model, task, task.corrupted_ids)
        self._fixed = ablation != "corrupted"
        self.substitute: Activations = ablated(clean, self._corrupted, task, ablation)
        self.clean_logits = clean.logits
        self.metric = Metric(metric, task, clean.logits, model.device)
        self._raise_active = raise_active
        self._removed = self.graph.no_edges()
        self._restore: list[tuple[list[Tensor], int, Tensor]] = []
        width = clean.embedding.shape
        self._differences = clean.embedding.new_zeros((len(self.graph.writers), *width))
        self.evaluations = 0

    # -- any circuit ------------------------------------------------------------------------------

    def logits(self, kept: BoolArray) -> Tensor:
        """Logits of a circuit at the answer positions.

        Args:
            kept: Its edges. [readers, writers]

        Returns:
            [rows, vocab]
        """
        return self._run(self.graph.all_edges & ~kept)

    def metric_of(self, kept: BoolArray) -> float:
        """The minimised metric of a circuit."""
        return self.metric(self.logits(kept))

    # -- the protocol of acdc.Engine --------------------------------------------------------------

    def begin(self, kept: BoolArray) -> float:
        """Start from an edge set; its metric."""
        self._removed = self.graph.all_edges & ~kept
        return self._measure(self._removed)

    def focus(self, reader: int) -> float | None:
        """Turn to a reader; the metric measured again when that changed a weight's precision."""
        if not self._raise_active:
            return None
        names = [self.graph.writers[node].name for node in self.graph.readers[reader].nodes]
        if not self.model.precision.activate(*names):
            return None
        self._recompute_substitute(reader)
        return self._measure(self._removed)

    def try_removals(self, reader: int, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Metric with each candidate's edges into `reader` removed besides those already gone."""
        values = []
        for writers in candidates:
            removed = self._removed.copy()
            removed[reader, list(writers)] = True
            values.append(self._measure(removed))
        return values

    def remove(self, reader: int, writers: Sequence[int]) -> None:
        """Remove edges into a reader for good."""
        self._removed[reader, list(writers)] = True

    def finish(self) -> None:
        """Leave the model as it was."""
        self.model.precision.deactivate()
        self._undo_substitute()

    # -- one run ----------------------------------------------------------------------------------

    def _measure(self, removed: BoolArray) -> float:
        self.evaluations += 1
        return self.metric(self._run(removed))

    def _run(self, removed: BoolArray) -> Tensor:
        run = _PatchedRun(self.model, self.substitute, removed, self._differences)
        with ExitStack() as stack:
            stack.enter_context(hooks(*run.register()))
            return answer_logits(self.model, self.task, self.task.clean_ids)

    # -- the active component's own corrupted outputs -----------------------------------------------

    def _recompute_substitute(self, reader: int) -> None:
        """Recompute what the component in focus writes in the corrupted run, at its new precision.

        Other components' corrupted activations are constants of the run (semantics.md, section 5).
        """
        self._undo_substitute()
        if self._fixed or not self.graph.readers[reader].nodes:
            return
        number = self.graph.readers[reader].layer
        layer, corrupted = self.model.layers[number], self._corrupted
        with torch.no_grad():
            if self.graph.readers[reader].kind == "mlp":
                values = layer.mlp(layer.mlp_norm(corrupted.mlp_in[number]))
                store = self.substitute.mlp
            else:
                values = head_outputs(layer, corrupted, number)
                store = self.substitute.z
        self._restore.append((store, number, store[number]))
        store[number] = values

    def _undo_substitute(self) -> None:
        while self._restore:
            store, number, values = self._restore.pop()
            store[number] = values


def head_outputs(layer: Layer, run: Activations, number: int) -> Tensor:
    """Z of a layer's heads in a recorded run, at the present precision. [batch, pos, head, d_head]"""
    attention = layer.attention
    x = layer.attention_norm(run.attention_in[number])
    rotary = run.rotary[number]
    q = attention.rotate(attention.q(x), rotary)
    k = attention.rotate(attention.k(x), rotary)
    return attention.mix(q, k, attention.v(x), run.masks[number])


class _PatchedRun:
    """The hooks of one forward pass under one edge set.

    `differences[w]` is `a_w - c_w` for writers that have written in this pass; a reader's input is the
    stream minus the differences along its removed edges, before its norm (semantics.md, section 2).
    """

    def __init__(
        self, model: PatchedModel, substitute: Activations, removed: BoolArray, differences: Tensor
    ) -> None:
        self._model = model
        self._graph = model.graph
        self._substitute = substitute
        self._removed = removed
        self._differences = differences  # [writers, batch, pos, d_model]

    def register(self) -> list[Any]:
        """Put all hooks in place; the caller removes them."""
        model = self._model
        first = model.layers[0].block.register_forward_pre_hook(self._on_embedding, with_kwargs=True)
        handles: list[Any] = [first]
        for number, layer in enumerate(model.layers):
            handles += self._register_layer(number, layer)
        handles.append(model.final_norm.register_forward_pre_hook(self._patch(self._graph.logits_reader)))
        return handles

    def _register_layer(self, number: int, layer: Layer) -> list[Any]:
        attention = layer.attention
        stream: list[Tensor] = []

        def keep_stream(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            stream[:] = [args[0]]

        def give_inputs(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**kwargs, "reader_inputs": self._reader_inputs(number, layer, stream[0])}

        def on_z(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = args[0].unflatten(-1, (attention.n_heads, -1))
            written = attention.contributions(z - self._substitute.z[number])
            start = self._graph.head_writer(number, 0)
            self._differences[start : start + attention.n_heads] = written.permute(2, 0, 1, 3)

        handles = [
            layer.attention_norm.register_forward_pre_hook(keep_stream),
            attention.register_forward_pre_hook(give_inputs, with_kwargs=True),
            attention.o_proj.register_forward_pre_hook(on_z),
        ]
        if self._model.spec.mlps:
            writer = self._graph.mlp_writer(number)

            def on_mlp(_: nn.Module, __: Any, output: Tensor) -> None:
                self._differences[writer] = output - self._substitute.mlp[number]

            reader = self._graph.layer_readers(number, "mlp")[0]
            handles.append(layer.mlp_norm.register_forward_pre_hook(self._patch(reader)))
            handles.append(layer.mlp.register_forward_hook(on_mlp))
        return handles

    def _on_embedding(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._differences[0] = first_input(args, kwargs) - self._substitute.embedding

    def _patch(self, reader: int) -> Any:
        """A pre-hook for a norm that only this reader uses."""

        def patch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            gone = self._gone(range(reader, reader + 1))
            return None if gone is None else (args[0] - gone[0], *args[1:])

        return patch

    def _reader_inputs(self, number: int, layer: Layer, stream: Tensor) -> Any:
        def inputs(kind: str) -> Tensor | None:
            gone = self._gone(self._graph.layer_readers(number, kind))  # type: ignore[arg-type]
            if gone is None:
                return None
            # The norm's own forward, not its call: its hooks belong to the shared stream.
            normed: Tensor = layer.attention_norm.forward(stream - gone)
            return normed

        return inputs

    def _gone(self, readers: range) -> Tensor | None:
        """What the removed edges take away from readers. [reader, batch, pos, d_model]"""
        rows = self._removed[readers.start : readers.stop]
        columns = np.flatnonzero(rows.any(axis=0))
        if not len(columns):
            return None
        index = torch.from_numpy(columns).to(self._differences.device)
        choose = torch.from_numpy(rows[:, columns]).to(self._differences)
        return torch.einsum("rw,wbpd->rbpd", choose, self._differences[index])
