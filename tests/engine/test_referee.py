"""The referee itself against Hugging Face: whole runs, and single edges and nodes patched by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.referee_data import LENGTH, Data, build, close, in_edges, out_edges
from tests.families import ALL_FAMILIES
from tests.models import relative_error
from tests.referee import Edge

pytestmark = pytest.mark.crossing
FAMILIES = ["gpt2", "llama", "llama-biases", "qwen2", "mistral"]
PADDINGS = ["none", "right", "left"]
OTHERS = [
    "mistral_window", "qwen3", "gpt_neox", "gpt_neox_sequential", "falcon", "falcon_new",
    "gemma", "gemma2", "gemma3", "olmo2",
]  # fmt: skip


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
