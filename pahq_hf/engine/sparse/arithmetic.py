"""How a node's new output follows from its new input: the one place where weights meet activations.

`Direct` recomputes a node from its whole input at the present precision. `Anchored` (docs/semantics.md,
section 5) starts from the current circuit in FP32 and lets low-precision weights multiply differences
from it only, `y = y0 + W_low (x - x0)`, so that rounding is relative to the effect of an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pahq_hf.circuit.graph import ReaderKind
from pahq_hf.engine.sparse.heads import HeadMath
from pahq_hf.modeling.layers import MLP
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.anchors import Anchor, Origin
from pahq_hf.precision.backward import is_differentiated
from pahq_hf.precision.products import DeltaProduct, Product, in_chunks

_CHUNK = 448  # tokens at once: measured

Room = Tensor | None  # where a result goes; None for memory of its own, through which gradients run


@dataclass(frozen=True)
class Reads:
    """What some readers of one kind and layer read.

    Attributes:
        math: The layer.
        kind: `q`, `k` or `v`.
        readers: The readers.
        blocks: Weight block of each.
        inputs: What each reads in the state, before the norm. Each [tokens, d_model]
    """

    math: HeadMath
    kind: ReaderKind
    readers: Sequence[int]
    blocks: Sequence[int]
    inputs: Sequence[Tensor]


class Arithmetic(Protocol):
    """Computes nodes, for the state of a circuit and for changes of it."""

    def state_precision(self) -> AbstractContextManager[None]:
        """The precision in which the state itself is computed."""

    def hold(self, number: int, *, attention: bool, mlp: bool) -> None:
        """Have ready what every batch needs of a layer, as far as memory allows.

        Args:
            number: Layer.
            attention: Whether some of its heads are live.
            mlp: Whether its MLP is.
        """

    def read(self, reads: Reads) -> Tensor:
        """Queries, keys or values of the state, before norm and rotation.

        Args:
            reads: Who reads what.

        Returns:
            [reader, tokens, d_head]
        """

    def reread(self, reads: Reads, changes: Sequence[Tensor]) -> Tensor:
        """The same after changes of the inputs.

        Args:
            reads: Who reads what in the state.
            changes: What is added to each input. Each [K, tokens, d_model]

        Returns:
            [reader, K, tokens, d_head]
        """

    def mlp(self, number: int, x: Tensor) -> Tensor:
        """What a layer's MLP adds in the state. [tokens, d_model] -> [tokens, d_model]"""

    def mlp_change(self, number: int, x: Tensor, change: Tensor, output: Tensor, out: Room) -> Tensor:
        """How that changes.

        Args:
            number: Layer.
            x: The MLP's input in the state. [tokens, d_model]
            change: What is added to it. [K, tokens, d_model]
            output: The MLP's output in the state. [tokens, d_model]
            out: Where the result goes. [K, tokens, d_model]

        Returns:
            [K, tokens, d_model]
        """

    def contribution(self, number: int, head: int) -> DeltaProduct:
        """What makes a change of a head's contribution of a change of its z: `W_O[h]`."""


class Direct:
    """Every node from its whole input, at the precision the model has now.

    Args:
        model: The patched model.
    """

    def __init__(self, model: PatchedModel) -> None:
        self._model = model

    def state_precision(self) -> AbstractContextManager[None]:
        """As it is."""
        return nullcontext()

    def hold(self, number: int, *, attention: bool, mlp: bool) -> None:
        """Output projections decoded, other live weights packed."""
        layer = self._model.layers[number]
        layer.attention.o_proj.hold_decoded()
        if attention:
            for linear in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
                linear.hold_decoded()
        if mlp:
            for linear in self._model.mlp_linears(layer):
                linear.hold_packed()

    def read(self, reads: Reads) -> Tensor:
        """Queries, keys or values of the state. [reader, tokens, d_head]"""
        return reads.math.raw(reads.kind, reads.blocks, reads.inputs)

    def reread(self, reads: Reads, changes: Sequence[Tensor]) -> Tensor:
        """The same after changes of the inputs. [reader, K, tokens, d_head]"""
        math = reads.math
        rooms = _Rooms(math, changes)
        for block, x, change in zip(reads.blocks, reads.inputs, changes, strict=True):
            product = math.product(reads.kind, block)

            def projected(new: Tensor, _: slice, room: Room, f: Product = product) -> Tensor:
                return _put(f(math.norm(new)), room)

            rooms.add(over_tokens(projected, x, change, rooms.next()))
        return rooms.all()

    def mlp(self, number: int, x: Tensor) -> Tensor:
        """What a layer's MLP adds in the state. [tokens, d_model]"""
        rooms = self._model.layers[number]
        with streamed(self._model, rooms.mlp):
            return in_chunks(lambda rows: rooms.mlp(rooms.mlp_norm(rows)), x)

    def mlp_change(self, number: int, x: Tensor, change: Tensor, output: Tensor, out: Room) -> Tensor:
        """How that changes. [K, tokens, d_model]"""
        rooms = self._model.layers[number]

        def changed(new: Tensor, tokens: slice, room: Room) -> Tensor:
            return torch.sub(rooms.mlp(rooms.mlp_norm(new)), output[tokens], out=room)

        with streamed(self._model, rooms.mlp):
            return over_tokens(changed, x, change, out)

    def contribution(self, number: int, head: int) -> DeltaProduct:
        """What makes a change of a head's contribution of a change of its z."""
        return self._model.layers[number].attention.packed_output(head)


@dataclass(frozen=True)
class _MLPAnchors:
    """The state of an MLP's projections.

    Attributes:
        linears: An anchor for each.
        ends: Whether the MLP adds what the last of them gives, so that its difference is the MLP's change.
    """

    linears: list[Anchor]
    ends: bool


class Anchored:
    """The state in FP32, streamed from the checkpoint; changes by low-precision weights.

    Args:
        model: The patched model, kept in low precision.
    """

    def __init__(self, model: PatchedModel) -> None:
        self._model = model
        self._reads: dict[int, tuple[Tensor, Tensor]] = {}  # reader -> its normed input and its projection
        self._mlps: dict[int, _MLPAnchors] = {}  # by layer
        # layer -> what its experts make of the state at the present precision, and whether that is raised
        self._routed: dict[int, tuple[Tensor, bool]] = {}

    def state_precision(self) -> AbstractContextManager[None]:
        """FP32."""
        return self._model.precision.full_precision()

    def hold(self, number: int, *, attention: bool, mlp: bool) -> None:
        """Output projections decoded, live MLPs packed; heads' pieces come as they are wanted."""
        layer = self._model.layers[number]
        layer.attention.o_proj.hold_decoded()
        for linear in self._model.mlp_linears(layer) if mlp else ():
            if layer.mlp.is_routed:
                linear.hold_packed()
            else:
                linear.hold_difference()

    def read(self, reads: Reads) -> Tensor:
        """Queries, keys or values of the state, which become anchors. [reader, tokens, d_head]"""
        math = reads.math
        raw = math.raw(reads.kind, reads.blocks, reads.inputs)
        for reader, x, y in zip(reads.readers, reads.inputs, raw, strict=True):
            self._reads[reader] = (math.norm(x), y)
        return raw

    def reread(self, reads: Reads, changes: Sequence[Tensor]) -> Tensor:
        """The same after changes of the inputs, by differences from the anchors."""
        math = reads.math
        rooms = _Rooms(math, changes)
        for reader, block, x, change in zip(reads.readers, reads.blocks, reads.inputs, changes, strict=True):
            product, anchor = math.difference(reads.kind, block), self._reads[reader]

            def moved(
                new: Tensor,
                rows: slice,
                room: Room,
                f: DeltaProduct = product,
                anchor: tuple[Tensor, Tensor] = anchor,
            ) -> Tensor:
                x0, y0 = anchor
                return torch.add(f(math.norm(new).sub_(x0[rows])), y0[rows], out=room)

            rooms.add(over_tokens(moved, x, change, rooms.next()))
        return rooms.all()

    def mlp(self, number: int, x: Tensor) -> Tensor:
        """What a layer's MLP adds in the state; each of its linears gets its anchor."""
        rooms = self._model.layers[number]
        if rooms.mlp.is_routed:
            self._routed.pop(number, None)
            return in_chunks(lambda rows: rooms.mlp(rooms.mlp_norm(rows)), x)
        linears = self._model.mlp_linears(rooms)
        with streamed(self._model, rooms.mlp), self._model.precision.mode.recording(linears) as records:
            output: Tensor = rooms.mlp(rooms.mlp_norm(x))
        anchors = [records[linear][0] for linear in linears]
        ends = bool(anchors) and anchors[-1].y is output  # nothing came after the last projection
        self._mlps[number] = _MLPAnchors(anchors, ends)
        return output

    def mlp_change(self, number: int, x: Tensor, change: Tensor, output: Tensor, out: Room) -> Tensor:
        """How that changes, by differences from the anchors. [K, tokens, d_model]"""
        rooms = self._model.layers[number]
        if rooms.mlp.is_routed:
            return self._routed_change(number, x, change, out)
        linears, state = self._model.mlp_linears(rooms), self._mlps[number]

        def changed(new: Tensor, tokens: slice, room: Room) -> Tensor:
            anchors = _at(state.linears, tokens)
            if state.ends:
                anchors[-1] = Anchor(anchors[-1].origin, None)
            with self._model.precision.mode.anchored(dict(zip(linears, anchors, strict=True))):
                result: Tensor = rooms.mlp(rooms.mlp_norm(new))
            return _put(result, room) if state.ends else torch.sub(result, output[tokens], out=room)

        return over_tokens(changed, x, change, out)

    def _routed_change(self, number: int, x: Tensor, change: Tensor, out: Room) -> Tensor:
        """A mixture of experts is anchored as one: its tokens may meet other weights than the anchor's."""
        rooms = self._model.layers[number]
        raised = any(linear.is_raised for linear in rooms.mlp.linears)
        if number not in self._routed or self._routed[number][1] != raised:
            made = in_chunks(lambda rows: rooms.mlp(rooms.mlp_norm(rows)), x)
            self._routed[number] = made, raised
        anchor = self._routed[number][0]

        def changed(new: Tensor, tokens: slice, room: Room) -> Tensor:
            return torch.sub(rooms.mlp(rooms.mlp_norm(new)), anchor[tokens], out=room)

        return over_tokens(changed, x, change, out)

    def contribution(self, number: int, head: int) -> DeltaProduct:
        """What makes a change of a head's contribution of a change of its z."""
        return self._model.layers[number].attention.packed_output_difference(head)


class _Rooms:
    """What readers read after changes, one after the other: in one room, or apart where it has gradients."""

    def __init__(self, math: HeadMath, changes: Sequence[Tensor]) -> None:
        shape = len(changes), *changes[0].shape[:2], math.attention.d_head
        follows = any(map(is_differentiated, changes))
        self._room = None if follows else changes[0].new_empty(shape)  # [reader, K, tokens, d_head]
        self._filled: list[Tensor] = []

    def next(self) -> Room:
        """Room for the next reader's. [K, tokens, d_head]"""
        return None if self._room is None else self._room[len(self._filled)]

    def add(self, values: Tensor) -> None:
        """Take the next reader's, which are in their room if there is one."""
        self._filled.append(values)

    def all(self) -> Tensor:
        """[reader, K, tokens, d_head]"""
        return torch.stack(self._filled) if self._room is None else self._room


def _put(values: Tensor, room: Room) -> Tensor:
    """Values, in a room if there is one."""
    return values if room is None else room.copy_(values)


def _at(anchors: Sequence[Anchor], tokens: slice) -> list[Anchor]:
    """Anchors at some tokens; maps that share an input go on sharing it."""
    origins: dict[int, Origin] = {}
    parts = []
    for anchor in anchors:
        origin = origins.setdefault(id(anchor.x), Origin(anchor.x[tokens]))
        parts.append(Anchor(origin, None if anchor.y is None else anchor.y[tokens]))
    return parts


def over_tokens(
    function: Callable[[Tensor, slice, Room], Tensor], x: Tensor, change: Tensor, out: Room
) -> Tensor:
    """Apply a token-wise function to `x + change` in pieces whose activations stay in cache.

    Args:
        function: Gets new inputs [k, tokens, d], which of the tokens they are, and where to write.
        x: [tokens, d]
        change: [K, tokens, d]
        out: Where the results go; without, as where they have gradients, all are made at once.
            [K, tokens, out]

    Returns:
        [K, tokens, out]
    """
    circuits, count = change.shape[:2]
    if out is None or x.device.type != "cpu":
        return function(x + change, slice(0, count), out)
    step = max(1, _CHUNK // max(1, count))
    for tokens in _ranges(count, _CHUNK + _CHUNK // 2):
        for some in _ranges(circuits, step):
            function(x[tokens] + change[some, tokens], tokens, out[some, tokens])
    return out


def contribute(product: DeltaProduct, change: Tensor, out: Room) -> Tensor:
    """Changes of a head's contribution, in pieces.

    Args:
        product: `W_O[h]`.
        change: Changes of its z. [K, tokens, d_head]
        out: Where the result goes. [K, tokens, d_model]

    Returns:
        [K, tokens, d_model]
    """
    if out is None:
        return product(change)
    step = max(1, 2 * _CHUNK // max(1, change.shape[1]))
    for some in _ranges(change.shape[0], step):
        out[some] = product.raw(change[some])
    return out


def _ranges(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def streamed(model: PatchedModel, mlp: MLP) -> AbstractContextManager[None]:
    """In full precision, read an MLP's weights once for all products inside; experts as they are hit."""
    return model.precision.streamed(() if mlp.is_routed else mlp.linears)
