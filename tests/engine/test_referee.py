"""The referee itself against Hugging Face: whole runs, and single edges and nodes patched by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.families import ALL_FAMILIES
from tests.models import relative_error
from tests.referee import Edge, Referee

pytestmark = pytest.mark.crossing

VOCAB, LENGTH, EXAMPLES = 50, 6, 4
FAMILIES = ["gpt2", "llama", "llama-biases", "qwen2", "mistral"]
PADDINGS = ["none", "right", "left"]
OTHERS = [
    "mistral_window", "qwen3", "gpt_neox", "gpt_neox_sequential", "falcon", "falcon_new",
    "gemma", "gemma2", "gemma3", "olmo2",
]  # fmt: skip


def build(
    family: str,
    *,
    layers: int = 2,
    heads: int = 4,
    groups: int = 2,
    dh: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A tiny random model, every parameter (norm weights and biases too) randomised."""
    torch.manual_seed(0)
    d = heads * dh
    if family == "gpt2":
        config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=d, n_layer=layers, n_head=heads)
        config._attn_implementation = "eager"
        model: Any = GPT2LMHeadModel(config)
    else:
        common: dict[str, Any] = {
            "vocab_size": VOCAB, "hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 64,
            "attn_implementation": "eager", "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        }  # fmt: skip
        if family == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True))
        elif family == "mistral":  # a head size of its own, a window that never bites
            model = MistralForCausalLM(MistralConfig(**common, head_dim=dh + 2, sliding_window=32))
        else:
            biased = family == "llama-biases"
            model = LlamaForCausalLM(LlamaConfig(**common, attention_bias=biased, mlp_bias=biased))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name or ".ln_" in name
            parameter.copy_(
                torch.randn_like(parameter) * 0.25 + (1.0 if norm and "bias" not in name else 0.0)
            )
    return model.to(dtype).eval()


class Data:
    """Random clean and corrupted tokens, padded on one side, with two answer rows for the first example."""

    def __init__(self, padding: str = "none") -> None:
        generator = torch.Generator().manual_seed(1)
        self.clean, self.corrupted = torch.randint(VOCAB, (2, EXAMPLES, LENGTH), generator=generator)
        self.mask = torch.ones(EXAMPLES, LENGTH, dtype=torch.long)
        last = [LENGTH - 1] * EXAMPLES
        for i in range(1, EXAMPLES):
            if padding == "right":
                self.mask[i, LENGTH - i :] = 0
                last[i] = LENGTH - i - 1
            elif padding == "left":
                self.mask[i, :i] = 0
        self.rows = torch.tensor([0, *range(EXAMPLES)])
        self.columns = torch.tensor([LENGTH - 2, *last])
        self.answers = [[1], [2, 3], [4], [5], [6, 7]]
        self.distractors = [[8, 9], [10], [11], [12], [13]]
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    def referee(self, model: Any, **options: Any) -> Referee:
        """A referee for these data."""
        return Referee(
            model, self.clean, self.corrupted, self.mask, self.rows, self.columns,
            self.answers, self.distractors, **options,
        )  # fmt: skip

    def hf_all(self, model: Any, ids: Tensor) -> Tensor:
        """The Hugging Face logits, [examples, positions, vocab]."""
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=self.mask, position_ids=self.positions).logits

    def hf(self, model: Any, ids: Tensor) -> Tensor:
        """The Hugging Face logits at the answer rows."""
        return self.hf_all(model, ids)[self.rows, self.columns]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Assert equality in float64 up to a tolerance."""
    torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor], *, before: bool = False) -> Iterator[None]:
    """Change a module's output, or (``before``) its first input, while the context lasts."""
    if before:
        handle = module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda m, args, out: change(out))
    with handle:
        yield


def record(data: Data, model: Any, ids: Tensor, module: nn.Module, *, before: bool = False) -> Tensor:
    """A module's output (or first input) in a plain run."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    with hooked(module, keep, before=before):
        data.hf_all(model, ids)
    return seen[0]


def blocks(model: Any) -> Any:
    """The model's layers."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def part(model: Any, layer: int, what: str) -> nn.Module:
    """A part of a block under one name for both families."""
    block = blocks(model)[layer]
    if hasattr(model, "transformer"):
        return {"norm2": block.ln_2, "mlp": block.mlp, "o": block.attn.c_proj}[what]
    attention = block.self_attn
    return {
        "norm2": block.post_attention_layernorm, "mlp": block.mlp, "o": attention.o_proj,
        "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj,
    }[what]  # fmt: skip


def out_edges(referee: Referee, writer: str) -> set[Edge]:
    """All edges of a writer."""
    return {e for e in referee.edges if e[0] == writer}


def in_edges(referee: Referee, *readers: str) -> set[Edge]:
    """All edges into these readers."""
    return {e for e in referee.edges if e[1] in readers}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_runs_equal_hf(family: str, padding: str) -> None:
    """No edge removed is the clean run, every edge removed the corrupted one (float32 Hugging Face)."""
    model, data = build(family), Data(padding)
    for split in (False, True):
        referee = data.referee(model, split_kv_groups=split)
        close(referee.circuit_logits(set()), data.hf(model, data.clean), 1e-5)
        close(referee.circuit_logits(set(referee.edges)), data.hf(model, data.corrupted), 1e-5)
        assert referee.metric(set()) == 0.0
    assert not torch.allclose(data.hf(model, data.clean), data.hf(model, data.corrupted), atol=0.1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_patches_equal_hooks(family: str, padding: str) -> None:
    """Single edges, writers and readers against hooks in a Hugging Face model.

    GPT-2 runs in float64. The Llama family's RMS norm and softmax are float32 whatever the model's dtype, and
    a float64 mask overflows there: a left-padded float64 model gives nan.
    """
    model, data = build(family, dtype=torch.float64 if family == "gpt2" else torch.float32), Data(padding)
    referee = data.referee(model)
    mlp = part(model, 0, "mlp")
    difference = record(data, model, data.clean, mlp) - record(data, model, data.corrupted, mlp)
    # Single edges, before the reader's norm.
    final = model.transformer.ln_f if family == "gpt2" else model.model.norm
    for module, reader in ((part(model, 1, "norm2"), "m1"), (final, "logits")):
        with hooked(module, lambda x: x - difference, before=True):
            close(referee.circuit_logits({("m0", reader)}), data.hf(model, data.clean))
    # A head's single edge: its slice of the output projection, without the bias.
    o = part(model, 0, "o")
    dh = record(data, model, data.clean, o, before=True).shape[-1] // 4
    one = slice(2 * dh, 3 * dh)
    z = record(data, model, data.clean, o, before=True) - record(data, model, data.corrupted, o, before=True)
    weight: Any = o.weight if family == "gpt2" else o.weight.T
    with hooked(part(model, 1, "norm2"), lambda x: x - z[..., one] @ weight[one], before=True):
        close(referee.circuit_logits({("a0.h2", "m1")}), data.hf(model, data.clean))
    # A writer whole: every edge out of it; the other ablations change only what replaces it.
    real = data.mask.bool()
    for ablation in ("corrupted", "zero", "mean", "mean-corrupted"):
        ids = data.clean if ablation == "mean" else data.corrupted
        ablated = data.referee(model, ablation=ablation)

        def instead(source: Tensor, ablation: str = ablation) -> Tensor:
            if not ablation.startswith("mean"):
                return source if ablation == "corrupted" else torch.zeros_like(source)
            out = torch.zeros_like(source)
            for p in range(LENGTH):
                here = data.positions == p
                out[here] = source[here & real].mean(0)
            return out

        replacement = instead(record(data, model, ids, mlp))
        with hooked(mlp, lambda x, r=replacement: r):
            close(ablated.circuit_logits(out_edges(ablated, "m0")), data.hf(model, data.clean))
        slices = instead(record(data, model, ids, o, before=True))
        with hooked(
            o,
            lambda x, s=slices: torch.cat([x[..., : 2 * dh], s[..., one], x[..., 3 * dh :]], -1),
            before=True,
        ):
            close(ablated.circuit_logits(out_edges(ablated, "a0.h2")), data.hf(model, data.clean))
    # A reader whole: what it projects becomes the corrupted run's.
    gpt2 = family == "gpt2"
    for kind, name in (("q", "a1.h2<q>"), ("k", "a1.kv1<k>"), ("v", "a1.kv0<v>")):
        module = blocks(model)[1].attn.c_attn if gpt2 else part(model, 1, kind)
        start = int(name[-4]) * dh + ("qkv".index(kind) * 4 * dh if gpt2 else 0)
        name = name.replace("kv", "h") if gpt2 else name
        there = record(data, model, data.corrupted, module)
        cut = slice(start, start + dh)

        def swap(x: Tensor, there: Tensor = there, cut: slice = cut) -> Tensor:
            x = x.clone()
            x[..., cut] = there[..., cut]
            return x

        with hooked(module, swap):
            close(referee.circuit_logits(in_edges(referee, name)), data.hf(model, data.clean))


def test_split_groups() -> None:
    """Removing both heads' split edges is removing the group's; removing one alone is not."""
    model, data = build("llama"), Data()
    native, split = data.referee(model), data.referee(model, split_kv_groups=True)
    for kind in "kv":
        whole = native.circuit_logits(in_edges(native, f"a1.kv1<{kind}>"))
        both = in_edges(split, f"a1.h2<{kind}>", f"a1.h3<{kind}>")
        close(split.circuit_logits(both), whole)
        assert not torch.allclose(split.circuit_logits(in_edges(split, f"a1.h2<{kind}>")), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "layers", "heads", "groups", "split", "count"),
    [
        ("gpt2", 12, 12, 12, False, 32_491),
        ("llama", 16, 32, 8, False, 195_865),
        ("llama", 16, 32, 8, True, 386_713),
        ("llama", 30, 9, 3, False, 70_651),
    ],
)
def test_edge_count(family: str, layers: int, heads: int, groups: int, split: bool, count: int) -> None:
    """Semantics 1 quotes these figures; the closed formula agrees."""
    referee = Data().referee(
        build(family, layers=layers, heads=heads, groups=groups, dh=2), split_kv_groups=split
    )
    before = [1 + i * (heads + 1) for i in range(layers)]
    per_layer = heads + 2 * (heads if split else groups)
    assert len(referee.edges) == len(set(referee.edges)) == count
    assert count == sum(b * per_layer + b + heads for b in before) + 1 + layers * (heads + 1)


def test_names() -> None:
    """Names and model order of a small grouped graph (semantics 1)."""
    referee = Data().referee(build("llama", layers=1))
    assert referee.writers == ["input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"]
    q = [f"a0.h{h}<q>" for h in range(4)]
    assert referee.readers == [*q, "a0.kv0<k>", "a0.kv1<k>", "a0.kv0<v>", "a0.kv1<v>", "m0", "logits"]
    assert ("m0", "logits") in referee.edges
    assert ("m0", "m0") not in referee.edges
    assert ("a0.h3", "m0") in referee.edges


def test_metrics() -> None:
    """Semantics 4, written out from the logits; two rows of the first example weigh half each."""
    model, data = build("qwen2"), Data("left")
    weights = torch.tensor([0.125, 0.125, 0.25, 0.25, 0.25], dtype=torch.float64)
    referee = data.referee(model)
    removed = set(referee.edges[::3])
    logits, full = referee.circuit_logits(removed), referee.circuit_logits(set())
    p, p_full = logits.softmax(-1), full.softmax(-1)
    good, bad = data.answers, data.distractors
    expected = {
        "kl": (p_full * (p_full / p).log()).sum(-1),
        "logit_diff": torch.stack(
            [-(logits[i, g].mean() - logits[i, bad[i]].mean()) for i, g in enumerate(good)]
        ),
        "nll": torch.stack([-p[i, g].sum().log() for i, g in enumerate(good)]),
        "prob_diff": torch.stack([-(p[i, g].sum() - p[i, bad[i]].sum()) for i, g in enumerate(good)]),
    }
    for name, values in expected.items():
        got = data.referee(model, metric=name).metric(removed)
        assert got == pytest.approx(float((values * weights).sum()), abs=1e-12)


def test_reader_order() -> None:
    """Both orders of semantics 3, grouped and with every head its own keys and values."""
    model = build("llama", layers=1)
    grouped, split = Data().referee(model), Data().referee(model, split_kv_groups=True)
    q = ["a0.h3<q>", "a0.h2<q>", "a0.h1<q>", "a0.h0<q>"]
    assert grouped.reader_order() == ["logits", "m0", "a0.kv1<v>", "a0.kv0<v>", "a0.kv1<k>", "a0.kv0<k>", *q]
    assert grouped.reader_order("head") == [
        "logits", "m0", *q[:2], "a0.kv1<k>", "a0.kv1<v>", *q[2:], "a0.kv0<k>", "a0.kv0<v>",
    ]  # fmt: skip
    assert split.reader_order("head") == [
        "logits",
        "m0",
        *(f"a0.h{h}<{x}>" for h in (3, 2, 1, 0) for x in "qkv"),
    ]
    for referee in (grouped, split):
        assert (
            sorted(referee.reader_order()) == sorted(referee.reader_order("head")) == sorted(referee.readers)
        )


@pytest.mark.parametrize("order", ["acdc", "head"])
def test_acdc_replay(order: str) -> None:
    """A run's record is consistent: scores replay, decisions follow, dead readers go."""
    data = Data("left")
    referee = data.referee(build("llama"))
    result = referee.acdc(0.05, order=order)
    assert set(result.tested) | result.untested == set(result.scores) == set(referee.edges)
    assert not set(result.tested) & result.untested
    assert result.kept and result.untested
    assert len(result.kept) < len(result.tested)
    removed: set[Edge] = set()
    for reader in referee.reader_order(order):
        mine = [e for e in result.tested if e[1] == reader]
        if not mine:  # dead: nothing these heads or this MLP write is kept, so dropping changes nothing
            before = referee.metric(removed)
            removed |= in_edges(referee, reader)
            assert in_edges(referee, reader) <= result.untested - result.kept
            assert referee.metric(removed) == pytest.approx(before, abs=1e-13)
        else:
            assert mine == [e for e in reversed(referee.edges) if e[1] == reader]
        for edge in mine:
            score = referee.metric(removed | {edge}) - referee.metric(removed)
            assert result.scores[edge] == pytest.approx(score, abs=1e-12)
            assert (edge in result.kept) == (score >= 0.05)
            removed |= set() if edge in result.kept else {edge}
    assert result.kept == set(referee.edges) - removed
    assert result.final == pytest.approx(referee.metric(removed), abs=1e-12)


def test_acdc_thresholds_and_restriction() -> None:
    """Extreme thresholds, the absolute rule, and a search restricted to some readers (semantics 3)."""
    data = Data()
    referee = data.referee(build("gpt2"), metric="logit_diff")
    nothing = referee.acdc(-1e9)
    assert nothing.kept == set(referee.edges) and not nothing.untested
    everything = referee.acdc(1e9)
    assert not everything.kept
    assert set(everything.tested) == in_edges(referee, "logits")
    strict = referee.acdc(0.0, absolute=True)  # |score| < 0 never holds
    assert strict.kept == set(referee.edges) and min(strict.scores.values()) < 0
    some = {"m1", "a1.h3<v>"}
    restricted = referee.acdc(1e9, readers=some)
    assert set(restricted.tested) == in_edges(referee, *some)
    assert restricted.kept == restricted.untested == set(referee.edges) - in_edges(referee, *some)


@pytest.mark.parametrize("order", ["acdc", "head"])
def test_dead_group_needs_all_heads_dead(order: str) -> None:
    """A group's reader is searched while any of its heads is kept, dropped when none is (semantics 3)."""
    referee = Data("left").referee(build("llama"), metric="kl")
    partly, dead = 0, 0
    for threshold in (0.05, 0.1, 0.2, 0.3):
        result = referee.acdc(threshold, order=order)
        kept_writers = {writer for writer, _ in result.kept}
        for reader in set(referee.readers) - {"logits"}:
            layer, _, name = reader.partition(".")
            group = name[:3]  # h0<, kv0 or nothing for an MLP
            heads = {"kv0": ["h0", "h1"], "kv1": ["h2", "h3"]}.get(group, [name[:2]])
            nodes = {f"{layer}.{h}" if h else layer for h in heads}
            alive = nodes & kept_writers
            assert in_edges(referee, reader) <= (set(result.tested) if alive else result.untested)
            partly += group.startswith("kv") and len(alive) == 1
            dead += group.startswith("kv") and not alive
    assert partly
    assert dead


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", OTHERS)
def test_whole_runs_of_other_families_equal_hf(family: str, padding: str) -> None:
    """As above, for what only these families do: parallel blocks, fused projections, norms after, caps."""
    model, data = ALL_FAMILIES[family](), Data(padding)
    clean, corrupted = data.hf(model, data.clean), data.hf(model, data.corrupted)
    assert relative_error(clean, corrupted) > 0.1
    for split in (False, True):
        referee = data.referee(model, split_kv_groups=split)
        assert relative_error(referee.circuit_logits(set()), clean) < 1e-5
        assert relative_error(referee.circuit_logits(set(referee.edges)), corrupted) < 1e-5


# What the layers' parts are called: attention's output map, what the heads add, what the MLP adds.
PARTS = {
    "gpt_neox": ("attention.dense", "attention.dense", "mlp"),
    "falcon": ("self_attention.dense", "self_attention.dense", "mlp"),
    "gemma2": ("self_attn.o_proj", "post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("self_attn.o_proj", "post_attention_layernorm", "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", PARTS)
def test_patches_of_other_families_equal_hooks(family: str, padding: str) -> None:
    """Writers (heads, MLPs) and readers (queries, keys, values) against hooks in a Hugging Face model."""
    model, data = ALL_FAMILIES[family](), Data(padding)
    referee = data.referee(model)
    base: Any = model.base_model
    layers: Any = base.h if family == "falcon" else base.layers
    final: Any = (
        base.ln_f if family == "falcon" else base.final_layer_norm if family == "gpt_neox" else base.norm
    )
    o, heads, mlp = (layers[0].get_submodule(name) for name in PARTS[family])
    clean = data.hf(model, data.clean)

    def check(removed: set[Edge]) -> None:
        theirs = data.hf(model, data.clean)
        assert relative_error(theirs, clean) > 1e-3
        assert relative_error(referee.circuit_logits(removed), theirs) < 1e-5

    # Writers, over one edge and over all: the MLP, a head (its slice, on the sum's scale), all heads.
    written = record(data, model, data.clean, mlp) - record(data, model, data.corrupted, mlp)
    with hooked(final, lambda x: x - written, before=True):
        check({("m0", "logits")})

    def slice_of(ids: Tensor) -> Tensor:
        z, total = record(data, model, ids, o, before=True), record(data, model, ids, o)
        dh = z.shape[-1] // 4
        one = z[..., 2 * dh : 3 * dh] @ o.weight[:, 2 * dh : 3 * dh].T
        if o is heads:
            return one
        gain = heads.weight + (1 if family == "gemma2" else 0)
        return one * gain * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps)

    with torch.no_grad():
        difference = slice_of(data.clean) - slice_of(data.corrupted)
    with hooked(final, lambda x: x - difference, before=True):
        check({("a0.h2", "logits")})
    there = record(data, model, data.corrupted, heads)
    with hooked(heads, lambda x: there):
        check({e for h in range(4) for e in out_edges(referee, f"a0.h{h}")})
    # Readers: what one projects becomes the corrupted run's, before any norm of queries and keys.
    for reader in ("a1.h2<q>", "a1.kv0<k>", "a1.kv0<v>"):
        kind, index = "qkv".index(reader[-2]), int(reader[-4])
        if family == "gpt_neox":  # head by head: query, key, value
            reader = reader.replace("kv", "h")
            module, start, dh = layers[1].attention.query_key_value, (3 * index + kind) * 8, 8
        elif family == "falcon":  # all queries, the key, the value
            module, start, dh = layers[1].self_attention.query_key_value, (index, 4, 5)[kind] * 8, 8
        else:
            module, dh = (
                layers[1].self_attn.get_submodule(f"{'qkv'[kind]}_proj"),
                referee.layers[1].q[0].shape[-1],
            )
            start = index * dh
        cut = (..., slice(start, start + dh))
        there = record(data, model, data.corrupted, module)[cut]

        def swap(x: Tensor, cut: Any = cut, there: Tensor = there) -> Tensor:
            x = x.clone()
            x[cut] = there
            return x

        with hooked(module, swap):
            check(in_edges(referee, reader))


def test_graphs_of_other_families() -> None:
    """Parallel blocks have no edge from heads to their own MLP; shared scales tie a layer's heads."""
    for family, parallel in (("gpt_neox", True), ("gpt_neox_sequential", False), ("falcon", True)):
        referee = Data().referee(ALL_FAMILIES[family]())
        assert (("a1.h0", "m1") in referee.edge_set) != parallel
        assert {("a0.h0", "m1"), ("m0", "m1"), ("a1.h0", "logits")} <= referee.edge_set
        assert referee.writers[1:6] == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"]
        assert referee.nodes["a1.h2<q>"] == ["a1.h2"]
    assert "a1.kv0<k>" in Data().referee(ALL_FAMILIES["falcon"]()).readers
    for family in ("gemma2", "olmo2"):
        referee = Data().referee(ALL_FAMILIES[family]())
        for reader in ("a1.h2<q>", "a1.kv0<k>", "a1.kv1<v>"):
            assert referee.nodes[reader] == ["a1.h0", "a1.h1", "a1.h2", "a1.h3"]


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_coupled_heads_live_and_die_together(family: str) -> None:
    """Where heads share a scale, a layer's readers are searched while any of its heads is kept."""
    referee = Data("left").referee(ALL_FAMILIES[family]())
    lone = 0  # readers of dead heads searched for the sake of others
    for threshold in (0.1, 0.3):
        result = referee.acdc(threshold)
        kept = {writer for writer, _ in result.kept}
        for reader in referee.readers:
            if reader.startswith("a"):
                alive = kept & {f"{reader[:2]}.h{h}" for h in range(4)}
                mine = in_edges(referee, reader)
                assert mine <= (set(result.tested) if alive else result.untested)
                lone += bool(alive) and reader.endswith("<q>") and reader[:5] not in alive
    assert lone
