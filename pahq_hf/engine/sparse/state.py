"""The current circuit's live activations, recomputed from the captured runs whenever edges go.

A node is live when what it adds still reaches the metric. Only live nodes in or above the layer under
search are held; everything below still has all its edges and is the clean run itself. A node's state is a
pure function of the edge set, never an accumulation over the history of the search, so nothing drifts
and a resumed search continues from the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pahq_hf.circuit.graph import BoolArray, Graph, ReaderKind
from pahq_hf.engine.sparse.arithmetic import Arithmetic, Reads
from pahq_hf.engine.sparse.captured import Captured, Carried
from pahq_hf.engine.sparse.heads import HeadMath
from pahq_hf.engine.sparse.positions import Liveness
from pahq_hf.precision.weight_cache import WeightCache

HEAD_KINDS: tuple[ReaderKind, ...] = ("q", "k", "v")


@dataclass
class AttentionState:
    """Live heads of one layer.

    Attributes:
        heads: Live heads by liveness, ascending.
        q: Rotated queries. [head, tokens, d_head]
        k: Rotated keys of every key reader. [reader, batch, pos, d_head]
        v: Values of every value reader. [reader, batch, pos, d_head]
        probabilities: Attention. [head, batch, width, pos]
        z: What heads read out. [head, tokens, d_head]
        raw: Where a norm spans all heads: queries, keys before it. [reader, tokens or window, d_head]
        output: Where a norm follows the output projection: what it gives, and that norm's scale.
    """

    heads: dict[Liveness, list[int]]
    k: Tensor = field(default_factory=lambda: torch.empty(0))
    v: Tensor = field(default_factory=lambda: torch.empty(0))
    q: dict[Liveness, Tensor] = field(default_factory=dict)
    probabilities: dict[Liveness, Tensor] = field(default_factory=dict)
    z: dict[Liveness, Tensor] = field(default_factory=dict)
    raw: dict[ReaderKind, Tensor] = field(default_factory=dict)
    output: NormedOutput | None = None


@dataclass
class NormedOutput:
    """An attention's output projection under a norm, which couples its heads.

    Attributes:
        heads: Each head's part of it. [head, tokens, d_model]
        total: Their sum. [tokens, d_model]
        scale: The norm's. [tokens, 1]
    """

    heads: Tensor
    total: Tensor
    scale: Tensor


class CircuitState:
    """Inputs of live readers and outputs of live nodes under an edge set.

    Args:
        graph: The model's graph.
        captured: The captured constants.
        math: Head computations per layer.
        cache: Keeps the weights of live nodes ready.
        arithmetic: How nodes are computed.
    """

    def __init__(
        self,
        graph: Graph,
        captured: Captured,
        math: list[HeadMath],
        cache: WeightCache,
        arithmetic: Arithmetic,
    ) -> None:
        self.graph = graph
        self.captured = captured
        self.math = math
        self.arithmetic = arithmetic
        self._cache = cache
        self.plan = captured.plan
        self.kept: BoolArray = self.graph.all_edges.copy()
        self.liveness: list[Liveness] = [Liveness.DEAD] * len(self.graph.writers)
        self.inputs: dict[int, Tensor] = {}  # reader -> [tokens, d_model]
        self.outputs: dict[int, Tensor] = {}  # MLP node -> what it adds [tokens, d_model]
        self.shifts: dict[int, Tensor] = {}  # node -> a_w - its clean value [tokens, d_model]
        self.attention: dict[int, AttentionState] = {}
        self.substitute_shifts: dict[int, Tensor] = {}  # node -> c_w - its captured value [window, d_model]
        self._bases: dict[int, Tensor] = {}  # reader -> its input without shifts [tokens, d_model]
        self._writers: dict[int, list[int]] = {}
        self._floor = len(self.graph.writers)
        self._candidates: BoolArray | None = None

    # -- what others ask --------------------------------------------------------------------------

    def kept_writers(self, reader: int) -> list[int]:
        """Writers of a reader's kept edges."""
        return self._writers[reader]

    def is_read(self, node: int) -> bool:
        """Whether a kept edge leaves a node."""
        return bool(self.kept[:, node].any())

    def reader_liveness(self, reader: int) -> Liveness:
        """At which tokens a reader's input matters."""
        node = self.graph.readers[reader]
        if node.kind == "logits":
            return Liveness.ANSWERS
        most = max(self.liveness[n] for n in node.feeds)
        if node.kind in ("k", "v") and most is not Liveness.DEAD:
            return Liveness.WINDOW
        return most

    def live_readers(self, layer: int, kind: ReaderKind) -> list[int]:
        """Live readers of a kind in a layer."""
        readers = self.graph.layer_readers(layer, kind)
        return [r for r in readers if self.reader_liveness(r) is not Liveness.DEAD]

    def carried(self, writers: Sequence[int], liveness: Liveness, out: Tensor | None = None) -> Tensor:
        """What edges carry under this circuit, `a_w - c_w`.

        Args:
            writers: Their writers: of kept edges, or of any into the reader under test.
            liveness: At which tokens.
            out: Where it goes; new memory by default. [writer, tokens, d_model]

        Returns:
            [writer, tokens, d_model]
        """
        carried = self.captured.differences(writers, liveness, out)
        if liveness is Liveness.DEAD:
            return carried.zero_()  # whatever it is, it goes nowhere
        for number, writer in enumerate(writers):
            shift = self.shifts.get(writer)
            if shift is not None:
                carried[number] += self.plan.narrow(shift, self.liveness[writer], liveness)
        return carried

    def every_carried(self, count: int, liveness: Liveness) -> Carried:
        """What edges of the first writers carry under this circuit; the captured ones where it changes none.

        Args:
            count: How many writers.
            liveness: At which tokens.
        """
        if liveness is Liveness.DEAD or any(writer < count for writer in self.shifts):
            return Carried.of(self.carried(range(count), liveness))
        return self.captured.every_difference(count, liveness)

    # -- moving on --------------------------------------------------------------------------------

    def update(
        self,
        kept: BoolArray,
        floor: int,
        changed_nodes: Iterable[int] = (),
        candidates: BoolArray | None = None,
    ) -> None:
        """Bring the state to an edge set. If that fails nothing is held, and it can be tried again.

        Args:
            kept: The edges. Readers of nodes below `floor` must have all theirs.
            floor: First node that is held if it is live; writers are numbered from input to output.
            changed_nodes: Nodes whose weights or substitutes changed without any edge changing.
            candidates: Edges that may come back: what they would carry is held too. [readers, writers]
        """
        try:
            rows = np.flatnonzero((kept != self.kept).any(axis=1))
            dirty = {int(row) for row in rows}
            self.kept = kept.copy()
            moved = floor != self._floor or not _same(candidates, self._candidates)
            self._floor, self._candidates = floor, candidates
            if moved or dirty:
                dirty |= self._update_liveness()
            self.hold_weights()
            with self.arithmetic.state_precision():
                self._refresh(dirty, set(changed_nodes))
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        """Hold nothing, as at first; substitutes that were changed stay so."""
        self.kept = self.graph.all_edges.copy()
        self.liveness = [Liveness.DEAD] * len(self.graph.writers)
        self._floor, self._candidates = len(self.graph.writers), None
        for held in (self.inputs, self.outputs, self.shifts, self.attention, self._bases, self._writers):
            held.clear()

    def hold_weights(self) -> None:
        """Keep decoded what every batch needs: live nodes' weights, and all output projections."""
        graph = self.graph
        self._cache.turn()
        for number in range(graph.spec.layers):
            first = graph.head_writer(number, 0)
            self.arithmetic.hold(
                number,
                attention=any(self.liveness[first : first + graph.spec.heads]),
                mlp=graph.spec.mlps and self.liveness[graph.mlp_writer(number)] is not Liveness.DEAD,
            )

    def _update_liveness(self) -> set[int]:
        """Recompute liveness from the top; returns readers whose liveness changed."""
        graph = self.graph
        before = [self.reader_liveness(r) for r in range(len(graph.readers))]
        need = np.zeros(len(graph.writers), dtype=np.int64)
        for reader in reversed(range(len(graph.readers))):
            node = graph.readers[reader]
            if node.feeds and node.feeds[0] < self._floor:
                continue
            if node.kind == "logits":
                matters = Liveness.ANSWERS
            else:
                feeds = list(node.feeds)
                most = Liveness(int(need[feeds].max()))
                if graph.spec.coupled:
                    need[feeds] = most  # heads that a norm couples are computed together
                shared = node.kind in ("k", "v") and most is not Liveness.DEAD
                matters = Liveness.WINDOW if shared else most
            row = self.kept[reader]
            if self._candidates is not None:
                row = row | self._candidates[reader]
            np.maximum(need, np.where(row, int(matters), 0), out=need)
        self.liveness = [
            Liveness(int(value)) if index >= self._floor else Liveness.DEAD
            for index, value in enumerate(need)
        ]
        return {r for r in range(len(graph.readers)) if self.reader_liveness(r) is not before[r]}

    def _refresh(self, dirty: set[int], changed: set[int]) -> None:
        for reader in dirty:
            self._bases.pop(reader, None)
            self.inputs.pop(reader, None)
        for layer in range(self.graph.spec.layers):
            self._refresh_attention(layer, changed)
            if self.graph.spec.mlps:
                self._refresh_mlp(layer, changed)
        self._refresh_input(self.graph.logits_reader, changed)

    def _refresh_input(self, reader: int, changed: set[int]) -> bool:
        """Recompute a reader's input if it is missing or reads something changed."""
        row = self.kept[reader]
        touched = any(w < self.graph.prefix[reader] for w in changed)
        if reader in self.inputs and not touched:
            return False
        liveness = self.reader_liveness(reader)
        if reader not in self._bases:
            self._bases[reader] = self.captured.base_input(reader, row, liveness)
            self._writers[reader] = [int(w) for w in np.flatnonzero(row)]
        total = self._bases[reader]  # [tokens, d_model]
        for writer in self._writers[reader]:
            shift = self.shifts.get(writer)
            if shift is not None:
                total = total + self.plan.narrow(shift, self.liveness[writer], liveness)
        for writer, shift in self.substitute_shifts.items():
            if writer < self.graph.prefix[reader] and not row[writer]:
                total = total + self.plan.narrow(shift, Liveness.WINDOW, liveness)
        if reader in self.inputs and torch.equal(total, self.inputs[reader]):
            return False
        self.inputs[reader] = total
        return True

    def _refresh_mlp(self, layer: int, changed: set[int]) -> None:
        reader = self.graph.layer_readers(layer, "mlp")[0]
        node = self.graph.mlp_writer(layer)
        liveness = self.liveness[node]
        if liveness is Liveness.DEAD:
            self._forget(node, changed)
            return
        if not self._refresh_input(reader, changed) and node not in changed and node in self.outputs:
            return
        output = self.arithmetic.mlp(layer, self.inputs[reader])  # [tokens, d_model]
        clean = self.plan.narrow(self.captured.mlp[layer], Liveness.WINDOW, liveness)
        self.outputs[node] = output
        self.shifts[node] = output - clean
        changed.add(node)

    def _forget(self, node: int, changed: set[int]) -> None:
        """Hold nothing of a node: nobody reads it, or it is below the floor now, where it is clean again."""
        self.outputs.pop(node, None)
        if self.shifts.pop(node, None) is not None and self.is_read(node):
            changed.add(node)

    # -- attention --------------------------------------------------------------------------------

    def _refresh_attention(self, layer: int, changed: set[int]) -> None:
        graph = self.graph
        nodes = [graph.head_writer(layer, head) for head in range(graph.spec.heads)]
        by_liveness: dict[Liveness, list[int]] = {}
        for head, node in enumerate(nodes):
            if self.liveness[node] is Liveness.DEAD:
                self._forget(node, changed)
            else:
                by_liveness.setdefault(self.liveness[node], []).append(head)
        if not by_liveness:
            self.attention.pop(layer, None)
            return
        moved = False
        for kind in HEAD_KINDS:
            for reader in self.live_readers(layer, kind):
                moved |= self._refresh_input(reader, changed)
        old = self.attention.get(layer)
        own = any(node in changed for node in nodes)
        if old is not None and old.heads == by_liveness and not moved and not own:
            return
        state = self._compute_attention(layer, by_liveness)
        self.attention[layer] = state
        for liveness, heads in by_liveness.items():
            clean = self.plan.narrow(self.captured.z[layer].transpose(0, 1)[heads], Liveness.WINDOW, liveness)
            shift = self.captured.change(layer, heads, self._written(layer, state, liveness), clean)
            for head, value in zip(heads, shift, strict=True):
                self.shifts[nodes[head]] = value
                changed.add(nodes[head])

    def _written(self, layer: int, state: AttentionState, liveness: Liveness) -> Tensor:
        """Z as it enters the stream, the norm's scale noted down. [head, tokens, d_head]"""
        output, z = self.math[layer].attention.output, state.z[liveness]
        if output.norm is None:
            return z if output.multiplier == 1.0 else z * output.multiplier
        each = self.math[layer].attention.packed_head_outputs(z, state.heads[liveness])
        total = each.sum(0)
        scale = output.scale(total)
        assert isinstance(scale, Tensor)
        state.output = NormedOutput(each, total, scale)
        return z * scale

    def _compute_attention(self, layer: int, heads: dict[Liveness, list[int]]) -> AttentionState:
        math = self.math[layer]
        state = AttentionState(heads)
        state.k, state.v = self._keys_or_values(layer, "k", state), self._keys_or_values(layer, "v", state)
        readers = self.graph.layer_readers(layer, "q")
        for liveness, members in heads.items():
            tokens = self.plan.at(liveness)
            own = [readers[head] for head in members]
            inputs = [self.inputs[reader] for reader in own]
            raw = self.arithmetic.read(Reads(math, "q", own, members, inputs))  # [head, tokens, d_head]
            if math.spans_heads:
                state.raw["q"] = raw
            q = math.finished("q", members, raw, tokens)  # [head, tokens, d_head]
            kv = [self.graph.kv_of_head(head) for head in members]
            # [head, 1, batch, width, pos]
            probabilities = math.attend(q[:, None], state.k[kv][:, None], members, tokens)
            state.q[liveness] = q
            state.probabilities[liveness] = probabilities[:, 0]
            state.z[liveness] = math.read_out(probabilities, state.v[kv][:, None], tokens)[:, 0]
        return state

    def _keys_or_values(self, layer: int, kind: ReaderKind, state: AttentionState) -> Tensor:
        """Keys or values of every reader of a layer. [reader, batch, pos, d_head]"""
        math = self.math[layer]
        clean = self.captured.attention_in[layer]  # [batch, pos, d_model]
        readers = self.graph.layer_readers(layer, kind)
        blocks = [self.weight_block(index) for index in range(len(readers))]
        distinct = sorted(set(blocks))
        raw = math.raw(kind, distinct, [clean.flatten(0, 1)] * len(distinct))
        projected = math.finished(kind, distinct, raw, None)  # [block, batch * pos, d_head]
        base = projected.unflatten(1, clean.shape[:2])[[distinct.index(block) for block in blocks]]
        live = self.live_readers(layer, kind)
        if not live:
            return base
        index = [r - readers.start for r in live]
        own = [blocks[i] for i in index]
        inputs = [self.inputs[r] for r in live]
        new = self.arithmetic.read(Reads(math, kind, live, own, inputs))  # [reader, window, d_head]
        if math.spans_heads:
            state.raw[kind] = new
        base = base.clone()
        finished = math.finished(kind, own, new, self.plan.window)  # [reader, window, d_head]
        base[index] = math.with_window(base[index], finished[:, None])[:, 0]
        return base

    def weight_block(self, kv_reader: int) -> int:
        """Key/value weight group of a key/value reader: several readers when groups are split."""
        return kv_reader * self.graph.spec.kv_groups // self.graph.spec.kv_readers


def _same(one: BoolArray | None, other: BoolArray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
