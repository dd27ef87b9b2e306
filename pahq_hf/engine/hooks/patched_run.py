"""One forward pass of the Hugging Face model under one edge set, and the exact run it may start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pahq_hf.capture.activations import Activations
from pahq_hf.circuit.graph import BoolArray, ReaderKind
from pahq_hf.modeling.hooks import LayerHooks, first_input, hook_layer
from pahq_hf.modeling.layers import Layer
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.anchors import Anchor
from pahq_hf.precision.linear import PAHQLinear


@dataclass(frozen=True)
class HeadAnchor:
    """An exact run's heads in one layer.

    Attributes:
        z: What they read out. [batch, pos, head, d_head]
        written: The same as it enters the stream. [batch, pos, head, d_head]
        outputs: The output projection head by head, where a norm follows it. [batch, pos, head, d_model]
        scale: Scale of that norm, [batch, pos, 1], or a factor.
    """

    z: Tensor
    written: Tensor
    outputs: Tensor | None
    scale: Tensor | float


@dataclass(frozen=True)
class MLPAnchor:
    """An exact run's mixture of experts, which is anchored as one (docs/semantics.md, section 5).

    Attributes:
        output: What it adds. [batch, pos, d_model]
        low: What low-precision weights make of its input. [batch, pos, d_model]
    """

    output: Tensor
    low: Tensor


@dataclass(frozen=True)
class RunAnchors:
    """An exact run of the current circuit, from which tests differ (docs/semantics.md, section 5).

    Attributes:
        linears: Input and output of every projection that is anchored by itself.
        heads: By layer.
        mlps: By layer, where there is a mixture of experts.
        differences: `a_w - c_w` of every writer. [writers, batch, pos, d_model]
        removed: Edges that were gone. [readers, writers]
        full_writers: Whether tested edges carry exact differences.
    """

    linears: dict[PAHQLinear, Anchor]
    heads: dict[int, HeadAnchor]
    mlps: dict[int, MLPAnchor]
    differences: Tensor
    removed: BoolArray
    full_writers: bool


def _single(model: PatchedModel) -> Iterator[PAHQLinear]:
    """The projections that are anchored by themselves: those that every token meets."""
    routed = {linear for layer in model.layers if layer.mlp.is_routed for linear in layer.mlp.linears}
    return (linear for linear in model.linears() if linear not in routed)


@contextmanager
def record_linears(model: PatchedModel) -> Iterator[dict[PAHQLinear, Anchor]]:
    """Note input and output of every projection in one forward pass; filled on exit."""
    found: dict[PAHQLinear, Anchor] = {}
    with model.precision.mode.recording(_single(model)) as records:
        yield found
    found.update({linear: record[0] for linear, record in records.items()})


class PatchedRun:
    """The hooks of one forward pass under one edge set.

    `differences[w]` is `a_w - c_w` for writers that have written in this pass. A reader's input, before its
    norm, is the stream minus the differences along its removed edges (docs/semantics.md, section 2). Where
    most edges are removed it is the ablated stream plus those along its kept edges, which is the same but for
    rounding: what little is left after taking nearly everything away would be rounding errors, and the norm
    would blow them up.
    """

    def __init__(
        self,
        model: PatchedModel,
        substitute: Activations,
        removed: BoolArray,
        differences: Tensor,
        anchors: RunAnchors | None = None,
        *,
        separate: bool = False,
    ) -> None:
        self._model = model
        self._graph = model.graph
        self._substitute = substitute
        self._removed = removed
        self._differences = differences  # [writers, batch, pos, d_model]
        self._anchors = anchors
        self._separate = separate or anchors is not None
        self.heads: dict[int, HeadAnchor] = {}  # what an exact run noted down
        self._mlp_runs: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> the stream it read, what it added

    def register(self) -> list[Any]:
        """Put all hooks in place; the caller removes them."""
        model = self._model
        first = model.layers[0].block.register_forward_pre_hook(self._on_embedding, with_kwargs=True)
        handles: list[Any] = [first]
        for number, layer in enumerate(model.layers):
            handles += hook_layer(layer, model.spec.mlps, self._hooks_of(number, layer))
        handles.append(model.final_norm.register_forward_pre_hook(self._on_final))
        return handles

    def mlp_anchors(self) -> dict[int, MLPAnchor]:
        """After an exact run: what low-precision weights make of the inputs of mixtures of experts."""
        found = {}
        for number, (stream, output) in self._mlp_runs.items():
            layer = self._model.layers[number]
            with torch.no_grad():
                found[number] = MLPAnchor(output, layer.mlp(layer.mlp_norm(stream)))
        return found

    def _hooks_of(self, number: int, layer: Layer) -> LayerHooks:
        stream: list[Tensor] = []

        def keep_stream(reads: Tensor) -> None:
            stream[:] = [reads]

        def give_inputs(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**kwargs, "reader_inputs": self._reader_inputs(number, layer, stream[0])}

        return LayerHooks(
            on_stream=keep_stream,
            on_attention=give_inputs,
            on_heads=lambda written, z, o: self._on_heads(number, layer, written, z, o),
            on_mlp_input=lambda reads: self._on_mlp_input(number, layer, reads),
            on_mlp=lambda adds: self._on_mlp(number, adds),
        )

    def _on_heads(self, number: int, layer: Layer, written: Tensor, z: Tensor, o: Tensor) -> None:
        attention = layer.attention
        start = self._graph.head_writer(number, 0)
        heads = slice(start, start + attention.n_heads)
        if self._anchors is None:
            change = attention.contributions(written - self._substitute.z[number])
            self._put(heads, change.permute(2, 0, 1, 3))
            if self._separate:
                each = None if attention.output.norm is None else attention.head_outputs(z)
                self.heads[number] = HeadAnchor(z, written, each, attention.output.scale(o))
            return
        before = self._anchors.heads[number]
        if before.outputs is None:
            change = attention.contributions(written - before.written)
        else:  # the exact outputs, times what the norm's scale changed by, and their changes
            scale, gain = attention.output.scale(o), attention.output.gain
            assert isinstance(scale, Tensor) and isinstance(before.scale, Tensor) and gain is not None
            moved = attention.head_outputs(z - before.z)
            change = gain * (scale[..., None] * moved + (scale - before.scale)[..., None] * before.outputs)
        self._put(heads, self._anchors.differences[heads] + change.permute(2, 0, 1, 3))

    def _on_mlp_input(self, number: int, layer: Layer, reads: Tensor) -> Tensor | None:
        reader = self._graph.layer_readers(number, "mlp")[0]
        streams = self._streams(range(reader, reader + 1), reads, self._substitute.mlp_in[number])
        if layer.mlp.is_routed and self._separate and self._anchors is None:
            self._mlp_runs[number] = (reads if streams is None else streams[0], reads)
        return None if streams is None else streams[0]

    def _on_mlp(self, number: int, adds: Tensor) -> Tensor | None:
        anchor = None if self._anchors is None else self._anchors.mlps.get(number)
        if number in self._mlp_runs:
            self._mlp_runs[number] = (self._mlp_runs[number][0], adds)
        if anchor is not None:
            adds = anchor.output + (adds - anchor.low)
        writer = self._graph.mlp_writer(number)
        self._put(slice(writer, writer + 1), (adds - self._substitute.mlp[number])[None])
        if self._separate and self._anchors is None:
            return adds.clone()  # Falcon adds to it in place, and it is an anchor's output
        return None if anchor is None else adds

    def _on_embedding(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._put(slice(0, 1), (first_input(args, kwargs) - self._substitute.embedding)[None])

    def _on_final(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        reader = self._graph.logits_reader
        streams = self._streams(range(reader, reader + 1), args[0], self._substitute.final_in)
        return None if streams is None else (streams[0], *args[1:])

    def _reader_inputs(self, number: int, layer: Layer, stream: Tensor) -> Any:
        def inputs(kind: ReaderKind) -> Tensor | None:
            readers = self._graph.layer_readers(number, kind)
            streams = self._streams(readers, stream, self._substitute.attention_in[number])
            if streams is None:
                return None
            # The norm's own forward, not its call: parallel blocks may have hooks on it for the MLP.
            normed: Tensor = layer.attention_norm.forward(streams)
            return normed

        return inputs

    def _streams(self, readers: range, stream: Tensor, ablated: Tensor) -> Tensor | None:
        """What each reader reads; None when they all read the stream. [reader, batch, pos, d_model]"""
        rows = slice(readers.start, readers.stop)
        removed = self._removed[rows]
        if not removed.any() and not self._separate:
            return None
        kept = self._graph.all_edges[rows] & ~removed
        mostly_kept = 2 * removed.sum(axis=1) <= self._graph.prefix[rows]
        signs = np.where(mostly_kept[:, None], -removed.astype(np.int8), kept.astype(np.int8))
        columns = np.flatnonzero(signs.any(axis=0))
        device = self._differences.device
        differences = self._of(columns)
        choose = torch.from_numpy(signs[:, columns]).to(self._differences)
        start = torch.from_numpy(mostly_kept).to(device)[:, None, None, None]
        streams = torch.where(start, stream, ablated) + torch.einsum("rw,wbpd->rbpd", choose, differences)
        return streams if self._anchors is None else self._with_tested_writers(readers, streams)

    def _put(self, writers: slice, differences: Tensor) -> None:
        """Note down `a_w - c_w` of consecutive writers. [writer, batch, pos, d_model]"""
        self._differences[writers] = differences

    def _of(self, writers: NDArray[np.intp]) -> Tensor:
        """The same of some writers, in order. [writer, batch, pos, d_model]"""
        return self._differences[torch.from_numpy(writers).to(self._differences.device)]

    def _with_tested_writers(self, readers: range, streams: Tensor) -> Tensor:
        """Let edges that went or came back since the anchor carry what tested edges do."""
        anchors = self._anchors
        assert anchors is not None
        for number, reader in enumerate(readers):
            for writer in np.flatnonzero(self._removed[reader] != anchors.removed[reader]):
                low = self._low_difference(int(writer))
                if low is not None:
                    sign = 1 if self._removed[reader, writer] else -1
                    streams[number] += sign * (anchors.differences[writer] - low)
        return streams

    def _low_difference(self, writer: int) -> Tensor | None:
        """What low weights make of a head's `z - c`, if tested edges carry that. [batch, pos, d_model]"""
        node, anchors = self._graph.writers[writer], self._anchors
        if anchors is None or anchors.full_writers or node.head is None:
            return None
        exact = anchors.heads[node.layer].written
        z = (exact - self._substitute.z[node.layer])[:, :, node.head : node.head + 1]
        return self._model.layers[node.layer].attention.stored_contributions(z, [node.head]).squeeze(-2)
