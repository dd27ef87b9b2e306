"""An independent brute-force referee for circuits and ACDC, written from the semantics page alone.

Plain float64 torch, computed by hand from a Hugging Face model's weights (`tests/referee_models.py` reads
them, and says of which families). It shares no code with the package it judges, and never runs the Hugging
Face forward pass. "Semantics" below means the project's ``docs/semantics.md``, sections 1 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.referee_models import Layer, Map, read_model

Edge = tuple[str, str]
Names = set[str]


@dataclass
class Result:
    """What an ACDC run found (semantics 3)."""

    kept: set[Edge] = field(default_factory=set)
    scores: dict[Edge, float] = field(default_factory=dict)
    untested: set[Edge] = field(default_factory=set)
    tested: list[Edge] = field(default_factory=list)
    final: float = math.nan


def _sets(rows: Any, n: int) -> list[list[int]]:
    """Token ids per answer row as lists; a bare id is a set of one, negative ids are filling."""
    out = [torch.as_tensor(row).long().flatten().tolist() for row in ([[]] * n if rows is None else rows)]
    assert len(out) == n, f"{len(out)} sets of tokens for {n} answer rows"
    return [[t for t in row if t >= 0] for row in out]


class Referee:
    """Every quantity of semantics 1 to 4 for one model and one data set, one full forward at a time.

    Row i of the logits is position ``answer_positions[i]`` of example ``answer_rows[i]``; ``answers[i]`` and
    ``distractors[i]`` are its token sets.
    """

    def __init__(
        self,
        hf_model: Any,
        clean_ids: Tensor,
        corrupted_ids: Tensor,
        attention_mask: Tensor | None,
        answer_rows: Tensor | Sequence[int],
        answer_positions: Tensor | Sequence[int],
        answers: Any,
        distractors: Any,
        *,
        metric: str = "kl",
        ablation: str = "corrupted",
        split_kv_groups: bool = False,
    ) -> None:
        """Read the weights, name the graph (semantics 1), run clean and corrupted once (semantics 2)."""
        assert metric in ("kl", "logit_diff", "nll", "prob_diff"), metric
        self.metric_name = metric
        self.mask = torch.ones_like(clean_ids) if attention_mask is None else attention_mask.long()
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.rows = torch.as_tensor(answer_rows).long()
        self.columns = torch.as_tensor(answer_positions).long()
        self.answers = _sets(answers, len(self.rows))
        self.distractors = _sets(distractors, len(self.rows))
        length = clean_ids.shape[1]
        # Causal, and the key is a real token; a query may always see itself, so that padding stays finite.
        real = torch.ones(length, length).tril().bool() & self.mask[:, None, :].bool()
        self.allowed = (real | torch.eye(length).bool())[:, None]

        self.model = read_model(hf_model, split=split_kv_groups)
        self.n_heads, self.n_kv, self.layers = self.model.n_heads, self.model.n_kv, self.model.layers
        self._name_graph()

        nothing = torch.zeros(len(self.readers), len(self.writers), dtype=torch.float64)
        self.clean_input, corrupted_input = self._embed(clean_ids), self._embed(corrupted_ids)
        # With no edge removed the corrupted activations do not enter: zeros stand in for them.
        blank = torch.zeros(len(self.writers), *self.clean_input.shape, dtype=torch.float64)
        clean, full = self._run(self.clean_input, nothing, blank)
        corrupted, _ = self._run(corrupted_input, nothing, blank)
        self.log_p_full = full.log_softmax(-1)
        means = {"mean": self._mean_per_position(clean), "mean-corrupted": self._mean_per_position(corrupted)}
        self.c = {"corrupted": corrupted, "zero": blank, **means}[ablation]

    def _embed(self, ids: Tensor) -> Tensor:
        """What `input` writes."""
        learned = self.model.learned
        return self.model.embedding[ids] + (0.0 if learned is None else learned[self.positions])

    def _name_graph(self) -> None:
        """Writers, readers, edges and the node(s) each reader belongs to (semantics 1)."""
        self.writers: list[str] = ["input"]
        self.readers: list[str] = []
        self.edges: list[Edge] = []
        self.nodes: dict[str, list[str]] = {}  # reader -> the writers it belongs to

        def read(reader: str, nodes: list[str]) -> None:
            self.readers.append(reader)
            self.nodes[reader] = nodes
            self.edges.extend((writer, reader) for writer in self.writers)

        per = self.n_heads // self.n_kv
        for i, layer in enumerate(self.layers):
            heads = [f"a{i}.h{h}" for h in range(self.n_heads)]
            for head in heads:
                read(f"{head}<q>", heads if self.model.coupled else [head])
            for kind in "kv":
                for g in range(self.n_kv):
                    mine = heads if self.model.coupled else heads[g * per : (g + 1) * per]
                    read(self._kv_name(i, g, kind), mine)
            if layer.parallel:  # the MLP reads before the heads have written
                read(f"m{i}", [f"m{i}"])
                self.writers += heads
            else:
                self.writers += heads
                read(f"m{i}", [f"m{i}"])
            self.writers.append(f"m{i}")
        read("logits", [])
        self.edge_set = set(self.edges)
        self.writer_index = {name: i for i, name in enumerate(self.writers)}
        self.reader_index = {name: i for i, name in enumerate(self.readers)}

    def _kv_name(self, layer: int, g: int, kind: str) -> str:
        """The name of a key or value reader (semantics 1)."""
        return f"a{layer}.{'h' if self.n_kv == self.n_heads else 'kv'}{g}<{kind}>"

    def _mean_per_position(self, acts: Tensor) -> Tensor:
        """Mean ablation: every writer's mean over all real tokens of a position id (semantics 2)."""
        out = torch.zeros_like(acts)
        for p in range(int(self.positions.max()) + 1):
            here = self.positions == p
            out[:, here] = acts[:, here & self.mask.bool()].mean(1, keepdim=True)
        return out

    def _rotate(self, layer: Layer, x: Tensor) -> Tensor:
        """Rotary position embedding, rotate-half convention; x is [examples, heads, positions, dh].

        The tables are float32 whatever the model's dtype, as Hugging Face computes them.
        """
        if layer.inv_freq is None:
            return x
        angles = (self.positions.float()[..., None] * layer.inv_freq).repeat(1, 1, 2)[:, None]
        turned, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
        a, b = turned.chunk(2, -1)
        turned = turned * angles.cos().double() + torch.cat([-b, a], -1) * angles.sin().double()
        return torch.cat([turned, rest], -1)

    def _heads(self, layer: Layer, x: Tensor) -> Tensor:
        """What a layer's heads write, given each attention reader's input. [heads, examples, positions, d]"""
        n_q, n_kv = self.n_heads, self.n_kv
        cuts = (slice(n_q), slice(n_q, n_q + n_kv), slice(n_q + n_kv, None))
        x = layer.norm1(x)
        q, k, v = (
            (torch.einsum("hbtd,hde->hbte", x[cut], weight) + b).transpose(0, 1)
            for cut, (weight, b) in zip(cuts, (layer.q, layer.k, layer.v), strict=True)
        )
        q, k = self._rotate(layer, layer.q_norm(q)), self._rotate(layer, layer.k_norm(k))
        k, v = (t.repeat_interleave(n_q // n_kv, 1) for t in (k, v))
        scores = layer.cap(q @ k.transpose(-1, -2) * layer.scale)
        index = torch.arange(self.mask.shape[1])
        age = index[:, None] - index[None, :]
        allowed = self.allowed if layer.window is None else self.allowed & (age < layer.window)
        pattern = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        out = torch.einsum("bhte,hed->hbtd", pattern @ v, layer.o)
        if layer.post_gain is None:
            return out
        # A norm over what all heads add together: its scale is shared, and contributions still add up.
        scale = torch.rsqrt((out.sum(0) ** 2).mean(-1, keepdim=True) + layer.post_eps)
        return out * scale * layer.post_gain

    def _mlp(self, maps: list[Map], x: Tensor) -> Tensor:
        """A plain or a gated MLP, its output bias included."""
        down, *up = maps
        hidden = [x @ weight + bias for weight, bias in up]
        hidden[0] = self.model.act(hidden[0])
        return math.prod(hidden[1:], start=hidden[0]) @ down[0] + down[1]

    def _run(self, embedded: Tensor, removed: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """A circuit's forward pass (semantics 2); ``removed`` is a 0/1 matrix [reader, writer].

        input(r) = constant biases so far + sum of a_w over kept edges + sum of c_w over removed ones.
        Returns all writers' activations and the logits at the answer rows.
        """
        acts = torch.zeros_like(c)
        acts[0] = embedded
        written, visited = 1, 0
        bias = torch.zeros(embedded.shape[-1], dtype=torch.float64)

        def read(count: int) -> Tensor:
            """The next ``count`` readers' inputs, [count, examples, positions, d]."""
            nonlocal visited
            gone = removed[visited : visited + count, :written]
            visited += count
            a, b = acts[:written].flatten(1), c[:written].flatten(1)
            return ((1 - gone) @ a + gone @ b).reshape(count, *embedded.shape) + bias

        n_q, n_kv = self.n_heads, self.n_kv
        for layer in self.layers:
            heads = self._heads(layer, read(n_q + 2 * n_kv))
            early = read(1)[0] if layer.parallel else None  # the MLP reads before the heads have written
            acts[written : written + n_q] = heads
            written += n_q
            bias = bias + layer.o_bias  # belongs to no head: always in the stream
            x = read(1)[0] if early is None else early
            acts[written] = layer.post_mlp(self._mlp(layer.mlp, layer.norm2(x)))
            written += 1
        final = self.model.final_norm(read(1)[0][self.rows, self.columns])
        return acts, self.model.cap(final @ self.model.unembed)

    def circuit_logits(self, removed: set[Edge]) -> Tensor:
        """Logits [rows, vocab] of the circuit with these edges removed (semantics 2)."""
        assert removed <= self.edge_set, f"no such edges: {sorted(removed - self.edge_set)[:5]}"
        gone = torch.zeros(len(self.readers), len(self.writers), dtype=torch.float64)
        for writer, reader in removed:
            gone[self.reader_index[reader], self.writer_index[writer]] = 1.0
        return self._run(self.clean_input, gone, self.c)[1]

    def metric(self, removed: set[Edge]) -> float:
        """The minimised metric: mean over an example's rows, then over examples (semantics 4)."""
        logits = self.circuit_logits(removed)
        log_p = logits.log_softmax(-1)
        per_row = [self._row_metric(i, logits[i], log_p[i]) for i in range(len(self.rows))]
        values = torch.tensor(per_row, dtype=torch.float64)
        return float(torch.stack([values[self.rows == e].mean() for e in set(self.rows.tolist())]).mean())

    def _row_metric(self, i: int, logits: Tensor, log_p: Tensor) -> float:
        """One answer row's value (semantics 4)."""
        good, bad = self.answers[i], self.distractors[i]
        if self.metric_name == "kl":
            return float((self.log_p_full[i].exp() * (self.log_p_full[i] - log_p)).sum())
        assert good and (bad or self.metric_name != "logit_diff"), f"answer row {i} lacks tokens"
        if self.metric_name == "logit_diff":
            return float(logits[bad].mean() - logits[good].mean())
        if self.metric_name == "nll":
            return float(-log_p[good].logsumexp(0))
        return float(log_p[bad].exp().sum() - log_p[good].exp().sum())

    def reader_order(self, order: str = "acdc") -> list[str]:
        """The order in which ACDC visits the readers (semantics 3)."""
        assert order in ("acdc", "head"), order
        out, per = ["logits"], self.n_heads // self.n_kv
        for i in reversed(range(len(self.layers))):
            out.append(f"m{i}")
            if order == "acdc":
                out += [self._kv_name(i, g, kind) for kind in "vk" for g in reversed(range(self.n_kv))]
                out += [f"a{i}.h{h}<q>" for h in reversed(range(self.n_heads))]
                continue
            for g in reversed(range(self.n_kv)):
                out += [f"a{i}.h{h}<q>" for h in reversed(range(g * per, (g + 1) * per))]
                out += [self._kv_name(i, g, "k"), self._kv_name(i, g, "v")]
        return out

    def acdc(
        self,
        threshold: float,
        *,
        order: str = "acdc",
        criterion: str = "signed",
        readers: Names | None = None,
    ) -> Result:
        """ACDC to the letter of semantics 3.

        The score of an edge is what removing it adds to the metric, by criterion "gap" what it adds to how
        far the metric is from the full model's; by "absolute" its size is held against the threshold.

        A reader outside ``readers`` keeps its in-edges: they count as kept and untested, with score 0.
        """
        assert readers is None or readers <= set(self.readers), "no such readers"
        result, removed = Result(), set[Edge]()
        full = current = self.metric(removed)
        for reader in self.reader_order(order):
            mine = [edge for edge in reversed(self.edges) if edge[1] == reader]  # latest first, input last
            searched = readers is None or reader in readers
            kept_out = (e for e in self.edges if e[0] in self.nodes[reader] and e not in removed)
            alive = reader == "logits" or any(True for _ in kept_out)
            if not searched or not alive:
                result.untested.update(mine)
                result.scores.update(dict.fromkeys(mine, 0.0))
                removed.update(mine if searched else ())
                continue
            for edge in mine:
                new = self.metric(removed | {edge})
                score = abs(new - full) - abs(current - full) if criterion == "gap" else new - current
                result.tested.append(edge)
                result.scores[edge] = score
                if (abs(score) if criterion == "absolute" else score) < threshold:
                    removed.add(edge)
                    current = new
        result.kept = self.edge_set - removed
        result.final = self.metric(removed)
        return result
