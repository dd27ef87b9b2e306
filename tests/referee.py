"""An independent brute-force referee for circuits and ACDC, written from the semantics page alone.

Plain float64 torch: GPT-2 and the Llama family (Llama, Qwen2, Mistral without a window in effect) by hand
from a Hugging Face model's weights. It shares no code with the package it judges, and never runs the
Hugging Face forward pass. "Semantics" below means the project's ``semantics.md``, sections 1 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Edge = tuple[str, str]

Map = tuple[Tensor, Tensor]  # weights [in, out], biases [out]; per head [heads, in, out], [heads, 1, 1, out]
Function = Callable[[Tensor], Tensor]
Names = set[str]

ACTIVATIONS: dict[str, Function] = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x * torch.sigmoid(x),
}


@dataclass
class Result:
    """What an ACDC run found (semantics 3)."""

    kept: set[Edge] = field(default_factory=set)
    scores: dict[Edge, float] = field(default_factory=dict)
    untested: set[Edge] = field(default_factory=set)
    tested: list[Edge] = field(default_factory=list)
    final: float = math.nan


@dataclass
class Layer:
    """One sequential block: its norms, per-head maps, and the attention's output bias."""

    norm1: Function
    q: Map
    k: Map
    v: Map
    o: Tensor
    o_bias: Tensor
    scale: float
    norm2: Function
    mlp: list[Map]  # down, up; or down, gate, up


def _norm(weight: Tensor, bias: Tensor | None, eps: float) -> Function:
    """A layer norm, or without a bias an RMS norm, in float64."""

    def normalise(x: Tensor) -> Tensor:
        x = x if bias is None else x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight
        return x if bias is None else x + bias

    return normalise


def _per_head(linear: Map, n: int, times: int = 1) -> Map:
    """Cut an [in, n * dh] map and its bias into heads, each ``times`` times over."""
    weight, bias = linear[0].reshape(len(linear[0]), n, -1).transpose(0, 1), linear[1].reshape(n, 1, 1, -1)
    return weight.repeat_interleave(times, 0), bias.repeat_interleave(times, 0)


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

        weights = {k: v.detach().to("cpu", torch.float64) for k, v in hf_model.state_dict().items()}
        self.layers: list[Layer] = []
        self._read(weights, hf_model.config, split_kv_groups)
        self._name_graph()

        nothing = torch.zeros(len(self.readers), len(self.writers), dtype=torch.float64)
        self.clean_input = self.embedding[clean_ids] + self.learned
        corrupted_input = self.embedding[corrupted_ids] + self.learned
        # With no edge removed the corrupted activations do not enter: zeros stand in for them.
        blank = torch.zeros(len(self.writers), *self.clean_input.shape, dtype=torch.float64)
        clean, full = self._run(self.clean_input, nothing, blank)
        corrupted, _ = self._run(corrupted_input, nothing, blank)
        self.log_p_full = full.log_softmax(-1)
        means = {"mean": self._mean_per_position(clean), "mean-corrupted": self._mean_per_position(corrupted)}
        self.c = {"corrupted": corrupted, "zero": blank, **means}[ablation]

    def _read(self, w: dict[str, Tensor], config: Any, split: bool) -> None:
        """Cut GPT2LMHeadModel's or {Llama,Qwen2,Mistral}ForCausalLM's weights into semantics 1's parts."""
        assert config.model_type in ("gpt2", "llama", "qwen2", "mistral"), config.model_type
        gpt2 = config.model_type == "gpt2"
        base = "transformer." if gpt2 else "model."
        eps = config.layer_norm_epsilon if gpt2 else config.rms_norm_eps
        self.act = ACTIVATIONS[config.activation_function if gpt2 else config.hidden_act]
        self.n_heads: int = config.num_attention_heads
        groups = self.n_heads if gpt2 else config.num_key_value_heads
        times = self.n_heads // groups if split else 1
        self.n_kv: int = groups * times
        self.rotary = (torch.ones(1).double(), torch.zeros(1).double()) if gpt2 else self._rotary(config)

        def norm(name: str) -> Function:
            return _norm(w[base + name + ".weight"], w.get(base + name + ".bias"), eps)

        def linear(name: str) -> Map:
            weight = w[base + name + ".weight"] if gpt2 else w[base + name + ".weight"].T
            return weight, w.get(base + name + ".bias", weight.new_zeros(weight.shape[1]))

        for i in range(config.num_hidden_layers):
            if gpt2:
                p, (weight, bias) = f"h.{i}.", linear(f"h.{i}.attn.c_attn")
                q, k, v = zip(weight.chunk(3, -1), bias.chunk(3), strict=True)
                (o, o_bias), norm1, norm2 = linear(p + "attn.c_proj"), norm(p + "ln_1"), norm(p + "ln_2")
                mlp = [linear(p + "mlp.c_proj"), linear(p + "mlp.c_fc")]
            else:
                p = f"layers.{i}."
                q, k, v, (o, o_bias) = (linear(f"{p}self_attn.{n}_proj") for n in "qkvo")
                norm1, norm2 = norm(p + "input_layernorm"), norm(p + "post_attention_layernorm")
                mlp = [linear(f"{p}mlp.{n}_proj") for n in ("down", "gate", "up")]
            q, k, v = _per_head(q, self.n_heads), _per_head(k, groups, times), _per_head(v, groups, times)
            o = o.reshape(self.n_heads, -1, o.shape[-1])
            scale = o.shape[1] ** -0.5 if getattr(config, "scale_attn_weights", True) else 1.0
            scale /= i + 1 if getattr(config, "scale_attn_by_inverse_layer_idx", False) else 1
            self.layers.append(Layer(norm1, q, k, v, o, o_bias, scale, norm2, mlp))
        self.embedding = w[base + ("wte.weight" if gpt2 else "embed_tokens.weight")]
        self.learned = w[base + "wpe.weight"][self.positions] if gpt2 else torch.zeros(1).double()
        self.final_norm, self.unembed = norm("ln_f" if gpt2 else "norm"), w["lm_head.weight"].T

    def _rotary(self, config: Any) -> tuple[Tensor, Tensor]:
        """The default rotary tables: float32 whatever the model's dtype, as Hugging Face computes them."""
        window, rope = getattr(config, "sliding_window", None), config.rope_parameters
        window = window if getattr(config, "use_sliding_window", True) else None
        assert window is None or window >= self.mask.shape[1], "a sliding window is in effect"
        assert rope.get("rope_type", "default") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
        dh = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inv_freq = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dh, 2).float() / dh))
        angles = (self.positions.float()[..., None] * inv_freq).repeat(1, 1, 2)[:, None]
        return angles.cos().double(), angles.sin().double()

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
        for i in range(len(self.layers)):
            heads = [f"a{i}.h{h}" for h in range(self.n_heads)]
            for head in heads:
                read(f"{head}<q>", [head])
            for kind in "kv":
                for g in range(self.n_kv):
                    read(self._kv_name(i, g, kind), heads[g * per : (g + 1) * per])
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

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding, rotate-half convention; x is [examples, heads, positions, dh]."""
        cos, sin = self.rotary
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def _mlp(self, maps: list[Map], x: Tensor) -> Tensor:
        """A plain or a gated MLP, its output bias included."""
        down, *up = maps
        hidden = [x @ weight + bias for weight, bias in up]
        hidden[0] = self.act(hidden[0])
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
        cuts = (slice(n_q), slice(n_q, n_q + n_kv), slice(n_q + n_kv, None))
        for layer in self.layers:
            x = layer.norm1(read(n_q + 2 * n_kv))
            q, k, v = (
                (torch.einsum("hbtd,hde->hbte", x[cut], weight) + b).transpose(0, 1)
                for cut, (weight, b) in zip(cuts, (layer.q, layer.k, layer.v), strict=True)
            )
            q, k = self._rotate(q), self._rotate(k)
            k, v = (t.repeat_interleave(n_q // n_kv, 1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) * layer.scale
            pattern = scores.masked_fill(~self.allowed, -math.inf).softmax(-1)
            acts[written : written + n_q] = torch.einsum("bhte,hed->hbtd", pattern @ v, layer.o)
            written += n_q
            bias = bias + layer.o_bias  # belongs to no head: always in the stream
            acts[written] = self._mlp(layer.mlp, layer.norm2(read(1)[0]))
            written += 1
        return acts, self.final_norm(read(1)[0][self.rows, self.columns]) @ self.unembed

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
        self, threshold: float, *, order: str = "acdc", absolute: bool = False, readers: Names | None = None
    ) -> Result:
        """ACDC to the letter of semantics 3.

        A reader outside ``readers`` keeps its in-edges: they count as kept and untested, with score 0.
        """
        assert readers is None or readers <= set(self.readers), "no such readers"
        result, removed = Result(), set[Edge]()
        current = self.metric(removed)
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
                score = new - current
                result.tested.append(edge)
                result.scores[edge] = score
                if (abs(score) if absolute else score) < threshold:
                    removed.add(edge)
                    current = new
        result.kept = self.edge_set - removed
        result.final = self.metric(removed)
        return result
