"""One forward pass of the Hugging Face model under one edge set, and the exact run it may start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pahq_hf.capture import Activations, first_input
from pahq_hf.graph import BoolArray, ReaderKind
from pahq_hf.patch import Layer, PatchedModel
from pahq_hf.precision import Anchor, PAHQLinear


@dataclass(frozen=True)
class RunAnchors:
    """An exact run of the current circuit, from which tests differ (semantics.md, section 5).

    Attributes:
        linears: Input and output of every projection.
        differences: `a_w - c_w` of every writer. [writers, batch, pos, d_model]
        removed: Edges that were gone. [readers, writers]
        full_writers: Whether tested edges carry exact differences.
    """

    linears: dict[PAHQLinear, Anchor]
    differences: Tensor
    removed: BoolArray
    full_writers: bool

    def z(self, layer: Layer) -> Tensor:
        """What the heads of a layer read out. [batch, pos, head, d_head]"""
        attention = layer.attention
        return self.linears[attention.o_proj].x.unflatten(-1, (attention.n_heads, -1))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, every projection starts from its anchor."""
        with ExitStack() as stack:
            for linear, anchor in self.linears.items():
                stack.enter_context(linear.anchored(anchor))
            yield


@contextmanager
def record_linears(model: PatchedModel) -> Iterator[dict[PAHQLinear, Anchor]]:
    """Note input and output of every projection in one forward pass; filled on exit."""
    found: dict[PAHQLinear, Anchor] = {}
    with ExitStack() as stack:
        records = {linear: stack.enter_context(linear.recording()) for linear in model.linears()}
        yield found
        found.update({linear: record[0] for linear, record in records.items()})


class PatchedRun:
    """The hooks of one forward pass under one edge set.

    `differences[w]` is `a_w - c_w` for writers that have written in this pass. A reader's input, before its
    norm, is the stream minus the differences along its removed edges (semantics.md, section 2). Where most
    edges are removed it is the ablated stream plus those along its kept edges, which is the same but for
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
            start = self._graph.head_writer(number, 0)
            heads = slice(start, start + attention.n_heads)
            if self._anchors is None:
                written = attention.contributions(z - self._substitute.z[number])
                self._differences[heads] = written.permute(2, 0, 1, 3)
            else:
                change = attention.contributions(z - self._anchors.z(layer))
                self._differences[heads] = self._anchors.differences[heads] + change.permute(2, 0, 1, 3)

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
        if not removed.any() and not self._separate:
            return None
        kept = self._graph.all_edges[rows] & ~removed
        mostly_kept = 2 * removed.sum(axis=1) <= self._graph.prefix[rows]
        signs = np.where(mostly_kept[:, None], -removed.astype(np.int8), kept.astype(np.int8))
        columns = np.flatnonzero(signs.any(axis=0))
        device = self._differences.device
        differences = self._differences[torch.from_numpy(columns).to(device)]
        choose = torch.from_numpy(signs[:, columns]).to(self._differences)
        start = torch.from_numpy(mostly_kept).to(device)[:, None, None, None]
        streams = torch.where(start, stream, ablated) + torch.einsum("rw,wbpd->rbpd", choose, differences)
        return streams if self._anchors is None else self._with_tested_writers(readers, streams)

    def _with_tested_writers(self, readers: range, streams: Tensor) -> Tensor:
        """Let edges removed since the anchor carry what low-precision weights make of `z - c`."""
        anchors = self._anchors
        assert anchors is not None
        if anchors.full_writers:
            return streams
        for number, reader in enumerate(readers):
            for writer in np.flatnonzero(self._removed[reader] & ~anchors.removed[reader]):
                node = self._graph.writers[writer]
                if node.head is None:
                    continue
                layer = self._model.layers[node.layer]
                z = (anchors.z(layer) - self._substitute.z[node.layer])[:, :, node.head : node.head + 1]
                low = layer.attention.stored_contribution(z, node.head)
                streams[number] += anchors.differences[writer] - low
        return streams
