"""Delta propagation: what removing edges of one reader changes, and nothing else.

Several circuits are computed side by side (`K`). A change of the reader's input changes its node, the
node's change goes along kept edges to live readers further up, and so on to the logits; every other
activation is a constant of the current state.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from pahq_hf.circuit.graph import ReaderKind
from pahq_hf.engine.sparse.arithmetic import Arithmetic, Reads, Room, contribute
from pahq_hf.engine.sparse.buffers import Rooms
from pahq_hf.engine.sparse.positions import Liveness
from pahq_hf.engine.sparse.state import HEAD_KINDS, CircuitState


class Propagation:
    """One batch of circuits on its way up.

    Args:
        state: The current circuit.
        reader: The reader whose input changes.
        delta: The change, at the reader's tokens. [K, tokens, d_model]
        arithmetic: How changes are computed.
        buffers: Where results go; in use until `final` returns. Without any, gradients of the result run
            back to `delta`.
    """

    def __init__(
        self,
        state: CircuitState,
        reader: int,
        delta: Tensor,
        arithmetic: Arithmetic,
        buffers: Rooms,
    ) -> None:
        self._state = state
        self._arithmetic = arithmetic
        self._buffers = buffers
        self._graph = state.graph
        self._plan = state.plan
        self._circuits = delta.shape[0]
        self._changes: dict[int, Tensor] = {}  # node -> change of what it adds [K, tokens, d_model]
        self._narrowed: dict[int, Tensor] = {}  # the same at the answers, for wider nodes
        self._start = {reader: delta}  # [K, tokens, d_model]
        self._first_layer = self._graph.readers[reader].layer

    def final(self) -> Tensor:
        """The stream the final norm reads. [K, rows, d_model]"""
        spec = self._graph.spec
        for layer in range(self._first_layer, spec.layers):
            self._through_attention(layer)
            if spec.mlps:
                self._through_mlp(layer)
        reader = self._graph.logits_reader
        base = self._state.inputs[reader]  # [rows, d_model]
        change = self._input_change(reader)  # [K, rows, d_model]
        return base.expand(self._circuits, -1, -1) if change is None else base + change

    # -- inputs -----------------------------------------------------------------------------------

    def _input_change(self, reader: int) -> Tensor | None:
        """Change of a live reader's input, or None. [K, tokens, d_model]"""
        if reader in self._start:
            return self._start[reader]
        want = self._state.reader_liveness(reader)
        total: Tensor | None = None  # [K, tokens, d_model]
        owned = False
        for writer in self._state.kept_writers(reader):
            change = self._change_at(writer, want)  # [K, tokens, d_model]
            if change is None:
                continue
            if total is None:
                total = change
            elif owned:
                total += change
            else:
                total = torch.add(total, change, out=self._buffers.take(("input", reader), change.shape))
                owned = True
        return total

    def _change_at(self, writer: int, want: Liveness) -> Tensor | None:
        """Change of what a node adds, at fewer tokens, or None. [K, tokens(want), d_model]"""
        change = self._changes.get(writer)
        have = self._state.liveness[writer]
        if change is None or have is want:
            return change
        if writer not in self._narrowed:
            self._narrowed[writer] = self._plan.narrow(change, have, want)
        return self._narrowed[writer]

    # -- nodes ------------------------------------------------------------------------------------

    def _through_mlp(self, layer: int) -> None:
        graph, state = self._graph, self._state
        node = graph.mlp_writer(layer)
        if state.liveness[node] is Liveness.DEAD:
            return
        reader = graph.layer_readers(layer, "mlp")[0]
        change = self._input_change(reader)
        if change is not None:
            out = self._buffers.take(node, change.shape)  # [K, tokens, d_model]
            self._changes[node] = self._arithmetic.mlp_change(
                layer, state.inputs[reader], change, state.outputs[node], out
            )

    def _through_attention(self, layer: int) -> None:
        state = self._state
        if layer not in state.attention:
            return
        moved: dict[ReaderKind, dict[int, Tensor]] = {}  # kind -> index in the layer -> change of its input
        for kind in HEAD_KINDS:
            readers = self._graph.layer_readers(layer, kind)
            moved[kind] = {}
            for reader in state.live_readers(layer, kind):
                change = self._input_change(reader)
                if change is not None:
                    moved[kind][reader - readers.start] = change
        if not any(moved.values()):
            return
        keys = self._project_shared(layer, "k", moved["k"])
        values = self._project_shared(layer, "v", moved["v"])
        for liveness, heads in state.attention[layer].heads.items():
            self._attend(layer, liveness, heads, moved["q"], keys, values)

    def _project_shared(self, layer: int, kind: ReaderKind, moved: dict[int, Tensor]) -> dict[int, Tensor]:
        """New keys or values of the readers whose input changed. Each [K, batch, pos, d_head]"""
        if not moved:
            return {}
        state, math = self._state, self._state.math[layer]
        readers = self._graph.layer_readers(layer, kind)
        index = list(moved)
        own = [readers[i] for i in index]
        blocks = [state.weight_block(i) for i in index]
        reads = Reads(math, kind, own, blocks, [state.inputs[r] for r in own])
        new = self._arithmetic.reread(reads, list(moved.values()))  # [reader, K, tokens, d_head]
        attention = state.attention[layer]
        base = attention.k if kind == "k" else attention.v  # [reader, batch, pos, d_head]
        if kind == "k" and math.spans_heads:  # one new key moves all
            new, index = self._among_all(attention.raw["k"], new, index), list(range(len(readers)))
            blocks = [state.weight_block(i) for i in index]
        finished = math.finished(kind, blocks, new, self._plan.window)
        return dict(zip(index, math.with_window(base[index], finished), strict=True))

    def _among_all(self, raw: Tensor, new: Tensor, index: Sequence[int]) -> Tensor:
        """Queries or keys of all heads, some of them new. [reader, K, tokens, d_head]"""
        every = raw[:, None].expand(-1, self._circuits, -1, -1).clone()
        every[list(index)] = new
        return every

    def _attend(
        self,
        layer: int,
        liveness: Liveness,
        heads: Sequence[int],
        queries: dict[int, Tensor],
        keys: dict[int, Tensor],
        values: dict[int, Tensor],
    ) -> None:
        """Changes of the heads of one liveness."""
        state, graph = self._state, self._graph
        slot = {head: number for number, head in enumerate(heads)}
        kv = {head: graph.kv_of_head(head) for head in heads}
        together = bool(queries) and state.math[layer].spans_heads  # one new query moves all
        looking = [h for h in heads if together or h in queries or kv[h] in keys]
        carrying = [h for h in heads if h not in looking and kv[h] in values]
        math, attention = state.math[layer], state.attention[layer]
        tokens = self._plan.at(liveness)
        changes: dict[int, Tensor] = {}  # head -> change of its z [K, tokens, d_head]
        if looking:
            q = self._queries(layer, liveness, looking, queries)  # [head, K, tokens, d_head]
            k = self._shared(attention.k, keys, [kv[h] for h in looking])
            v = self._shared(attention.v, values, [kv[h] for h in looking])
            z = math.read_out(math.attend(q, k, looking, tokens), v, tokens)  # [head, K, tokens, d_head]
            before = attention.z[liveness][[slot[h] for h in looking]]
            changes |= zip(looking, z - before[:, None], strict=True)
        if carrying:  # the pattern stays, only what is carried changes
            slots = [slot[h] for h in carrying]
            pattern = attention.probabilities[liveness][slots]  # [head, batch, width, pos]
            pattern = pattern[:, None].expand(-1, self._circuits, -1, -1, -1)
            v = self._shared(attention.v, values, [kv[h] for h in carrying])
            z = math.read_out(pattern, v, tokens)
            changes |= zip(carrying, z - attention.z[liveness][slots][:, None], strict=True)
        if changes:
            self._write(layer, changes)

    def _queries(
        self, layer: int, liveness: Liveness, heads: Sequence[int], queries: dict[int, Tensor]
    ) -> Tensor:
        """[head, K, tokens, d_head]"""
        state = self._state
        readers = self._graph.layer_readers(layer, "q")
        members = state.attention[layer].heads[liveness]
        slots = [members.index(h) for h in heads]
        q = state.attention[layer].q[liveness][slots][:, None].expand(-1, self._circuits, -1, -1)
        new = [number for number, h in enumerate(heads) if h in queries]
        if not new:
            return q
        changing = [heads[i] for i in new]
        own = [readers[head] for head in changing]
        tokens, math = self._plan.at(liveness), state.math[layer]
        reads = Reads(math, "q", own, changing, [state.inputs[r] for r in own])
        raw = self._arithmetic.reread(
            reads, [queries[head] for head in changing]
        )  # [head, K, tokens, d_head]
        if math.spans_heads:  # then `heads` are all
            return math.finished(
                "q", heads, self._among_all(state.attention[layer].raw["q"], raw, new), tokens
            )
        projected = math.finished("q", changing, raw, tokens)
        if len(new) == len(heads):
            return projected
        q = q.clone()
        q[new] = projected
        return q

    def _shared(self, base: Tensor, new: dict[int, Tensor], readers: Sequence[int]) -> Tensor:
        """Keys or values of each head. [head, K or 1, batch, pos, d_head]"""
        if not any(r in new for r in readers):
            return base[list(readers)][:, None]
        return torch.stack(
            [new[r] if r in new else base[r].expand(self._circuits, -1, -1, -1) for r in readers]
        )

    def _write(self, layer: int, changes: dict[int, Tensor]) -> None:
        """Changes of heads' contributions, of those of their z. Each [K, tokens, d_head]"""
        output = self._state.math[layer].attention.output
        if output.norm is not None:
            self._write_normed(layer, changes)
            return
        for head, moved in changes.items():
            node = self._graph.head_writer(layer, head)
            scaled = moved if output.multiplier == 1.0 else moved * output.multiplier
            product = self._arithmetic.contribution(layer, head)
            self._changes[node] = contribute(product, scaled, self._room(node, moved))

    def _write_normed(self, layer: int, changes: dict[int, Tensor]) -> None:
        """The same where a norm follows: every head's contribution changes with the norm's scale.

        With o_h a head's part of the output projection, s the scale and g the norm's weight, a change
        of g s o_h is g (s' do_h + (s' - s) o_h).
        """
        state = self._state
        attention, before = state.math[layer].attention, state.attention[layer].output
        gain = attention.output.gain
        assert before is not None and gain is not None
        moved: dict[int, Tensor] = {}
        total = before.total.expand(self._circuits, -1, -1).clone()  # [K, tokens, d_model]
        for head, change in changes.items():
            room = self._room(("moved", head), change)  # wanted in this layer only
            moved[head] = contribute(self._arithmetic.contribution(layer, head), change, room)
            total += moved[head]
        scale = attention.output.scale(total)  # [K, tokens, 1]
        assert isinstance(scale, Tensor)
        for head in range(attention.n_heads):
            node = self._graph.head_writer(layer, head)
            if not state.is_read(node):
                continue
            room = self._room(node, next(iter(changes.values())))
            out = torch.mul(scale - before.scale, before.heads[head], out=room)
            if head in moved:
                out.addcmul_(scale.expand_as(out), moved[head])
            self._changes[node] = out.mul_(gain)

    def _room(self, name: Hashable, change: Tensor) -> Room:
        """Room for changes at the tokens of another. [K, tokens, d_model]"""
        return self._buffers.take(name, (*change.shape[:2], self._state.captured.width))
