"""What the referee knows of Hugging Face's models: their weights in float64, cut into semantics 1's parts.

One reader per way of naming the weights: GPT-2's; Llama's (Mistral, Qwen2, Qwen3, OLMo-2, Gemma 1 to 3 too);
and that of the fused families (GPT-NeoX, Falcon without ALiBi). It shares no code with the package, and never
runs a Hugging Face module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Map = tuple[Tensor, Tensor]  # weights [in, out], biases [out]; per head [heads, in, out], [heads, 1, 1, out]
Function = Callable[[Tensor], Tensor]


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Function] = {
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x * torch.sigmoid(x),
}

LLAMA_LIKE = ("llama", "qwen2", "qwen3", "mistral", "olmo2", "gemma", "gemma2", "gemma3_text")
BASES = {"gpt2": "transformer.", "falcon": "transformer.", "gpt_neox": "gpt_neox."}  # the others': "model."
FINAL_NORMS = {"gpt2": "ln_f", "falcon": "ln_f", "gpt_neox": "final_layer_norm"}  # the others': "norm"


def same(x: Tensor) -> Tensor:
    """The norm of a model that has none in this place."""
    return x


@dataclass
class Layer:
    """One block, read as norms and per-head maps."""

    q: Map
    k: Map
    v: Map
    o: Tensor
    o_bias: Tensor
    mlp: list[Map]  # down, up; or down, gate, up
    norm1: Function  # before attention
    norm2: Function  # before the MLP
    scale: float  # of the scores
    parallel: bool = False  # the MLP reads what attention reads
    q_norm: Function = same  # of [examples, heads, positions, dh]
    k_norm: Function = same
    inv_freq: Tensor | None = None  # rotary frequencies; they turn the first 2 * len(inv_freq) coordinates
    window: int | None = None  # how many tokens one sees, itself included
    cap: Function = same  # of the scores
    post_gain: Tensor | None = None  # of an RMS norm over the sum of all heads
    post_eps: float = 0.0
    post_mlp: Function = same


@dataclass
class Model:
    """A model, read as semantics 1 reads it."""

    n_heads: int
    n_kv: int  # key/value readers per layer
    coupled: bool  # what one head writes depends on the other heads of its layer
    act: Function
    embedding: Tensor
    learned: Tensor | None  # learned positions
    layers: list[Layer]
    final_norm: Function
    unembed: Tensor
    cap: Function  # of the logits


def norm(weight: Tensor, bias: Tensor | None, eps: float) -> Function:
    """A layer norm, or without a bias an RMS norm, in float64."""

    def normalise(x: Tensor) -> Tensor:
        x = x if bias is None else x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight
        return x if bias is None else x + bias

    return normalise


def _joint(normalise: Function) -> Function:
    """A norm over the coordinates of all heads of [examples, heads, positions, dh] together."""

    def together(x: Tensor) -> Tensor:
        flat = normalise(x.transpose(1, 2).flatten(2))
        return flat.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)

    return together


def _softcap(cap: float | None) -> Function:
    """``cap * tanh(x / cap)``."""
    return same if cap is None else lambda x: cap * torch.tanh(x / cap)


def _per_head(linear: Map, n: int, times: int = 1) -> Map:
    """Cut an [in, n * dh] map and its bias into heads, each ``times`` times over."""
    weight, bias = linear[0].reshape(len(linear[0]), n, -1).transpose(0, 1), linear[1].reshape(n, 1, 1, -1)
    return weight.repeat_interleave(times, 0), bias.repeat_interleave(times, 0)


def _unfuse(linear: Map, groups: int, heads: int) -> list[Map]:
    """Queries, keys and values out of one map whose outputs are, group by group, its queries, key, value."""
    per = heads // groups
    out: list[Map] = []
    for cut in (slice(per), slice(per, per + 1), slice(per + 1, None)):
        weight, bias = (x.unflatten(-1, (groups, per + 2, -1))[..., cut, :].flatten(-3) for x in linear)
        out.append((weight, bias))
    return out


def _inv_freq(config: Any, dh: int, kind: str | None) -> Tensor:
    """Rotary frequencies, float32 as Hugging Face computes them; ``kind`` is the layer's attention type."""
    rope = config.rope_parameters.get(kind, config.rope_parameters)
    assert rope.get("rope_type", "default") in ("default", "linear"), rope
    dims = int(dh * rope.get("partial_rotary_factor", 1.0))
    inv_freq = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dims, 2).float() / dims))
    return inv_freq / rope.get("factor", 1.0)


class _Weights:
    """A checkpoint's float64 maps and norms by their names below the base model."""

    def __init__(self, hf_model: Any) -> None:
        config = hf_model.config
        self.kind: str = config.model_type
        self.base = BASES.get(self.kind, "model.")
        self.w = {k: v.detach().to("cpu", torch.float64) for k, v in hf_model.state_dict().items()}
        names = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
        self.eps = float(next(getattr(config, name) for name in names if hasattr(config, name)))

    def has(self, name: str) -> bool:
        return f"{self.base}{name}.weight" in self.w

    def linear(self, name: str) -> Map:
        weight = self.w[f"{self.base}{name}.weight"]
        weight = weight if self.kind == "gpt2" else weight.T  # GPT-2 stores [in, out]
        return weight, self.w.get(f"{self.base}{name}.bias", weight.new_zeros(weight.shape[1]))

    def gain(self, name: str) -> Tensor:
        """Gemma stores how far a gain is from 1."""
        return self.w[f"{self.base}{name}.weight"] + (1.0 if self.kind.startswith("gemma") else 0.0)

    def norm(self, name: str) -> Function:
        return norm(self.gain(name), self.w.get(f"{self.base}{name}.bias"), self.eps)


def read_model(hf_model: Any, *, split: bool) -> Model:
    """Read a model; with ``split``, keys and values once per query head instead of once per group."""
    config, w = hf_model.config, _Weights(hf_model)
    kind, heads = w.kind, config.num_attention_heads
    assert kind in (*LLAMA_LIKE, *BASES), kind
    read = {"gpt2": _gpt2_layer, "falcon": _falcon_layer, "gpt_neox": _gpt_neox_layer}.get(kind, _llama_layer)
    groups = config.num_key_value_heads if kind in LLAMA_LIKE else heads
    if kind == "falcon":
        assert not config.alibi
        groups = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    times = heads // groups if split else 1
    embedding = hf_model.get_input_embeddings().weight.detach().to("cpu", torch.float64)
    acts = ("activation_function", "activation", "hidden_activation", "hidden_act")
    return Model(
        n_heads=heads,
        n_kv=groups * times,
        coupled=kind in ("gemma2", "gemma3_text", "olmo2"),
        act=ACTIVATIONS[next(getattr(config, name) for name in acts if hasattr(config, name))],
        embedding=embedding * (config.hidden_size**0.5 if kind.startswith("gemma") else 1.0),
        learned=w.w["transformer.wpe.weight"] if kind == "gpt2" else None,
        layers=[read(w, config, i, groups, times) for i in range(config.num_hidden_layers)],
        final_norm=w.norm(FINAL_NORMS.get(kind, "norm")),
        unembed=hf_model.get_output_embeddings().weight.detach().to("cpu", torch.float64).T,
        cap=_softcap(getattr(config, "final_logit_softcapping", None)),
    )


def _gpt2_layer(w: _Weights, config: Any, i: int, groups: int, times: int) -> Layer:
    """A block of GPT2LMHeadModel."""
    p, (weight, bias) = f"h.{i}.", w.linear(f"h.{i}.attn.c_attn")
    q, k, v = (_per_head(one, groups) for one in zip(weight.chunk(3, -1), bias.chunk(3), strict=True))
    o, o_bias = w.linear(p + "attn.c_proj")
    scale = q[0].shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
    return Layer(
        q, k, v, o.reshape(groups, -1, o.shape[-1]), o_bias,
        mlp=[w.linear(p + "mlp.c_proj"), w.linear(p + "mlp.c_fc")],
        norm1=w.norm(p + "ln_1"), norm2=w.norm(p + "ln_2"),
        scale=scale / (i + 1 if config.scale_attn_by_inverse_layer_idx else 1),
    )  # fmt: skip


def _llama_layer(w: _Weights, config: Any, i: int, groups: int, times: int) -> Layer:
    """A block of Llama and of those who took over its names: what there is decides what is done."""
    p, heads = f"layers.{i}.", config.num_attention_heads
    q, k, v, (o, o_bias) = (w.linear(f"{p}self_attn.{n}_proj") for n in "qkvo")
    q, k, v = _per_head(q, heads), _per_head(k, groups, times), _per_head(v, groups, times)
    dh = q[0].shape[-1]
    kinds = getattr(config, "layer_types", None)
    windowed = kinds[i] == "sliding_attention" if kinds else True
    layer = Layer(
        q, k, v, o.reshape(heads, dh, -1), o_bias,
        mlp=[w.linear(f"{p}mlp.{n}_proj") for n in ("down", "gate", "up")],
        norm1=w.norm(p + "input_layernorm") if w.has(p + "input_layernorm") else same,
        norm2=w.norm(p + "post_attention_layernorm"),
        scale=getattr(config, "query_pre_attn_scalar", dh) ** -0.5,
        inv_freq=_inv_freq(config, dh, kinds[i] if kinds else None),
        window=getattr(config, "sliding_window", None) if windowed else None,
        cap=_softcap(getattr(config, "attn_logit_softcapping", None)),
    )  # fmt: skip
    if w.has(p + "post_feedforward_layernorm"):  # then the post-attention norm is what its name says
        assert not o_bias.any(), "an output bias under a norm is not constant"
        layer.post_gain, layer.post_eps = w.gain(p + "post_attention_layernorm"), w.eps
        layer.post_mlp = w.norm(p + "post_feedforward_layernorm")
        before = p + "pre_feedforward_layernorm"
        layer.norm2 = w.norm(before) if w.has(before) else same
    if w.has(p + "self_attn.q_norm"):
        layer.q_norm, layer.k_norm = w.norm(p + "self_attn.q_norm"), w.norm(p + "self_attn.k_norm")
        if w.kind == "olmo2":
            gain = w.gain(p + "self_attn.k_norm").reshape(groups, dh).repeat_interleave(times, 0).flatten()
            layer.q_norm, layer.k_norm = _joint(layer.q_norm), _joint(norm(gain, None, w.eps))
    return layer


def _gpt_neox_layer(w: _Weights, config: Any, i: int, groups: int, times: int) -> Layer:
    """A block of GPTNeoXForCausalLM."""
    p = f"layers.{i}."
    layer = _fused_layer(w, config, p, p + "attention.", groups, times)
    layer.norm2 = w.norm(p + "post_attention_layernorm")
    layer.parallel = config.use_parallel_residual
    return layer


def _falcon_layer(w: _Weights, config: Any, i: int, groups: int, times: int) -> Layer:
    """A block of FalconForCausalLM: of falcon-7b (one norm), falcon-40b (two norms) or a sequential one."""
    p = f"h.{i}."
    layer = _fused_layer(w, config, p, p + "self_attention.", groups, times)
    layer.parallel = config.new_decoder_architecture or config.parallel_attn
    mlp_norms = (p + "ln_mlp", p + "post_attention_layernorm", p + "input_layernorm")
    layer.norm2 = w.norm(next(name for name in mlp_norms if w.has(name)))
    return layer


def _fused_layer(w: _Weights, config: Any, p: str, attention: str, groups: int, times: int) -> Layer:
    """What GPT-NeoX and Falcon have in common; which norm the MLP has is left to them."""
    heads = config.num_attention_heads
    q, k, v = _unfuse(w.linear(attention + "query_key_value"), groups, heads)
    o, o_bias = w.linear(attention + "dense")
    dh = q[0].shape[-1] // heads
    return Layer(
        _per_head(q, heads), _per_head(k, groups, times), _per_head(v, groups, times),
        o.reshape(heads, dh, -1), o_bias,
        mlp=[w.linear(p + "mlp.dense_4h_to_h"), w.linear(p + "mlp.dense_h_to_4h")],
        norm1=w.norm(p + ("ln_attn" if w.has(p + "ln_attn") else "input_layernorm")), norm2=same,
        scale=dh**-0.5, inv_freq=_inv_freq(config, dh, None),
    )  # fmt: skip
