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

from pahq_hf.capture import Activations, ablated, answer_logits, capture, first_input, hooks, with_streams
from pahq_hf.config import Ablation, MetricName
from pahq_hf.graph import BoolArray, Graph, ReaderKind
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

    Raises:
        TaskError: If the prompts do not fit the model.
        MetricError: If the task lacks what the metric needs, or a run's metric is NaN.
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
        self.substitute: Activations = ablated(model, clean, self._corrupted, task, ablation)
        self.clean_logits = clean.logits
        self.metric = Metric(metric, task, clean.logits, model.device)
        for run in (clean, self._corrupted):
            self.metric(run.logits)  # NaN fails here, before anything is searched or written
        self._raise_active = raise_active
        self._ablated = self.substitute  # with the streams these writers add up to
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
        self._ablated = self.substitute

    # -- one run ----------------------------------------------------------------------------------

    def _measure(self, removed: BoolArray) -> float:
        self.evaluations += 1
        return self.metric(self._run(removed))

    def _run(self, removed: BoolArray) -> Tensor:
        run = _PatchedRun(self.model, self._ablated, removed, self._differences)
        with ExitStack() as stack:
            stack.enter_context(hooks(*run.register()))
            return answer_logits(self.model, self.task, self.task.clean_ids)

    # -- the active component's own corrupted outputs -----------------------------------------------

    def _recompute_substitute(self, reader: int) -> None:
        """Recompute what the component in focus writes in the corrupted run, at its new precision.

        Other components' corrupted activations are constants of the run (semantics.md, section 5).
        """
        self._undo_substitute()
        if not self._fixed and self.graph.readers[reader].nodes:
            self._replace_substitute(reader)
        self._ablated = with_streams(self.model, self.substitute)

    def _replace_substitute(self, reader: int) -> None:
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

    `differences[w]` is `a_w - c_w` for writers that have written in this pass. A reader's input, before its
    norm, is the stream minus the differences along its removed edges (semantics.md, section 2). Where most
    edges are removed it is the ablated stream plus those along its kept edges, which is the same but for
    rounding: what little is left after taking nearly everything away would be rounding errors, and the norm
    would blow them up.
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
        on_final = self._patch(self._graph.logits_reader, self._substitute.final_in)
        handles.append(model.final_norm.register_forward_pre_hook(on_final))
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
            on_mlp_norm = self._patch(reader, self._substitute.mlp_in[number])
            handles.append(layer.mlp_norm.register_forward_pre_hook(on_mlp_norm))
            handles.append(layer.mlp.register_forward_hook(on_mlp))
        return handles

    def _on_embedding(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._differences[0] = first_input(args, kwargs) - self._substitute.embedding

    def _patch(self, reader: int, ablated: Tensor) -> Any:
        """A pre-hook for a norm that only this reader uses."""

        def patch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            streams = self._streams(range(reader, reader + 1), args[0], ablated)
            return None if streams is None else (streams[0], *args[1:])

        return patch

    def _reader_inputs(self, number: int, layer: Layer, stream: Tensor) -> Any:
        def inputs(kind: ReaderKind) -> Tensor | None:
            readers = self._graph.layer_readers(number, kind)
            streams = self._streams(readers, stream, self._substitute.attention_in[number])
            if streams is None:
                return None
            # The norm's own forward, not its call: its hooks belong to the shared stream.
            normed: Tensor = layer.attention_norm.forward(streams)
            return normed

        return inputs

    def _streams(self, readers: range, stream: Tensor, ablated: Tensor) -> Tensor | None:
        """What each reader reads; None when they all read the stream. [reader, batch, pos, d_model]"""
        rows = slice(readers.start, readers.stop)
        removed = self._removed[rows]
        if not removed.any():
            return None
        kept = self._graph.all_edges[rows] & ~removed
        mostly_kept = 2 * removed.sum(axis=1) <= self._graph.prefix[rows]
        signs = np.where(mostly_kept[:, None], -removed.astype(np.int8), kept.astype(np.int8))
        columns = np.flatnonzero(signs.any(axis=0))
        device = self._differences.device
        differences = self._differences[torch.from_numpy(columns).to(device)]
        choose = torch.from_numpy(signs[:, columns]).to(self._differences)
        start = torch.from_numpy(mostly_kept).to(device)[:, None, None, None]
        return torch.where(start, stream, ablated) + torch.einsum("rw,wbpd->rbpd", choose, differences)
