"""Tiny random models of every Hugging Face family the package reads; `tests/models.py` has the basic ones.

All of them have 4 query heads and, where the family groups queries, 2 key/value groups. What a family's
configuration can turn on (windows, caps, multipliers, norms of queries and keys, partial rotation) is on,
and away from the value at which it would not show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from tests.models import COMMON, FAMILIES, HEADS, KV_HEADS, WIDTH, build_model, llama_like

Builder = Callable[..., PreTrainedModel]
Settings = Callable[[int], dict[str, Any]]  # of a number of layers

WINDOW = 4  # fewer tokens than a prompt has
HALF_ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}


def _family(
    model: Callable[[Any], PreTrainedModel], config: Callable[..., PretrainedConfig], settings: Settings
) -> Builder:
    """A builder of a family's tiny models.

    Args:
        model: The family's class.
        config: The class of its configuration.
        settings: Keyword arguments of the configuration.

    Returns:
        A builder; arguments as `tests.models.tiny_gpt2`.
    """

    def build(*, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        return build_model(model, config(**settings(layers)), dtype, seed)

    return build


def llama(**changes: Any) -> Settings:
    """Settings under Llama's names."""
    return lambda layers: llama_like(layers) | changes


def _ungrouped(**changes: Any) -> Settings:
    """Settings under Llama's names, as far as older families have them; tied or not as the family is."""
    gone = ("num_key_value_heads", "intermediate_size", "tie_word_embeddings")
    return lambda layers: {k: v for k, v in llama_like(layers).items() if k not in gone} | changes


def _gpt2(**changes: Any) -> Settings:
    """Settings under GPT-2's names."""
    return lambda layers: (
        COMMON | {"n_layer": layers, "n_embd": WIDTH, "n_head": HEADS, "n_positions": 64} | changes
    )


def known(model_type: str, settings: Settings) -> Builder:
    """The same of the classes that transformers knows by a family's name."""
    return _family(
        AutoModelForCausalLM.from_config,
        lambda **options: AutoConfig.for_model(model_type, **options),
        settings,
    )


def tiny_gpt_neo(*, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """GPT-Neo: windows in odd layers; nothing scales its scores, so queries and keys are drawn small."""
    kinds = [[["global", "local"], layers // 2], [["global"], layers % 2]]
    config = GPTNeoConfig(**_ungrouped(attention_types=kinds, window_size=WINDOW)(layers))
    model = build_model(GPTNeoForCausalLM, config, torch.float32, seed)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 0.6
        parameter.data = parameter.data.to(dtype)
    return model


def _moe(**changes: Any) -> Settings:
    """Settings of Qwen's sparse blocks: 4 experts, 2 of them at a time."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
    return llama(**experts, **changes)


def _gemma(layer_types: bool = True, **changes: Any) -> Settings:
    """Settings of Gemma: tied, heads wider than their share of the stream, and windows in even layers."""

    def settings(layers: int) -> dict[str, Any]:
        shape = _windows() if layer_types else llama()
        return shape(layers) | {"head_dim": 12, "tie_word_embeddings": True} | changes

    return settings


def _windows(**changes: Any) -> Settings:
    """Settings of families with windows in even layers."""

    def settings(layers: int) -> dict[str, Any]:
        kinds = ("sliding_attention", "full_attention")
        types = [kinds[i % 2] for i in range(layers)]
        return llama_like(layers) | {"sliding_window": WINDOW, "layer_types": types} | changes

    return settings


def _rope(layers: int) -> list[int]:
    """Which layers turn queries and keys: every other one."""
    return [number % 2 for number in range(layers)]


def _mpt(layers: int) -> dict[str, Any]:
    sizes = {"n_layers": layers, "d_model": WIDTH, "n_heads": HEADS, "max_seq_len": 64}
    return COMMON | sizes | {"attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.4}}


def _gpt_oss(layers: int) -> dict[str, Any]:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.0}
    rope = {"rope_type": "default", "rope_theta": 100.0}
    return _windows(**experts, head_dim=12, attention_bias=True, rope_parameters=rope)(layers)


def _xglm(layers: int) -> dict[str, Any]:
    sizes = {"num_layers": layers, "d_model": WIDTH, "attention_heads": HEADS, "ffn_dim": 2 * WIDTH}
    return COMMON | sizes | {"max_position_embeddings": 64}


GPT_NEOX = {"rope_parameters": HALF_ROTARY, "intermediate_size": 2 * WIDTH}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA4_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 64 / 3,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.4,
    "original_max_position_embeddings": 3,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
}
GRANITE = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.5,
}
COHERE = {"tie_word_embeddings": True, "logit_scale": 0.6}
FALCON_NEW = {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS}
FALCON_ALIBI = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}

ALL_FAMILIES: dict[str, Builder] = FAMILIES | {
    "gpt_neo": tiny_gpt_neo,
    "gptj": _family(GPTJForCausalLM, GPTJConfig, _gpt2(rotary_dim=4)),
    "gpt_neox": _family(GPTNeoXForCausalLM, GPTNeoXConfig, _ungrouped(**GPT_NEOX)),
    "gpt_neox_sequential": _family(
        GPTNeoXForCausalLM, GPTNeoXConfig, _ungrouped(**GPT_NEOX, use_parallel_residual=False)
    ),
    "opt": _family(OPTForCausalLM, OPTConfig, _ungrouped(ffn_dim=2 * WIDTH)),
    "mixtral": _family(MixtralForCausalLM, MixtralConfig, llama(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3": _family(Qwen3ForCausalLM, Qwen3Config, llama(head_dim=12)),
    "qwen3_moe": _family(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, _moe(head_dim=12, mlp_only_layers=[0], norm_topk_prob=True)
    ),
    "qwen2_moe": _family(Qwen2MoeForCausalLM, Qwen2MoeConfig, _moe(shared_expert_intermediate_size=WIDTH)),
    "gemma": _family(GemmaForCausalLM, GemmaConfig, _gemma(layer_types=False)),
    "gemma2": _family(
        Gemma2ForCausalLM,
        Gemma2Config,
        _gemma(query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3": _family(
        Gemma3ForCausalLM, Gemma3TextConfig, _gemma(query_pre_attn_scalar=20, rope_parameters=GEMMA3_ROPE)
    ),
    "phi": _family(PhiForCausalLM, PhiConfig, llama(rope_parameters=HALF_ROTARY)),
    "phi_qk": _family(PhiForCausalLM, PhiConfig, llama(rope_parameters=HALF_ROTARY, qk_layernorm=True)),
    "phi3": _family(Phi3ForCausalLM, Phi3Config, llama(rope_parameters=HALF_ROTARY)),
    "olmo2": _family(Olmo2ForCausalLM, Olmo2Config, llama()),
    "stablelm": _family(
        StableLmForCausalLM, StableLmConfig, llama(rope_parameters=HALF_ROTARY, use_qkv_bias=True)
    ),
    "stablelm_parallel": _family(
        StableLmForCausalLM,
        StableLmConfig,
        llama(rope_parameters=HALF_ROTARY, use_parallel_residual=True, qk_layernorm=True),
    ),
    "granite": _family(GraniteForCausalLM, GraniteConfig, llama(**GRANITE)),
    "falcon": _family(FalconForCausalLM, FalconConfig, _ungrouped(multi_query=True, parallel_attn=True)),
    "falcon_new": _family(FalconForCausalLM, FalconConfig, _ungrouped(**FALCON_NEW)),
    "falcon_alibi": _family(FalconForCausalLM, FalconConfig, _ungrouped(**FALCON_ALIBI)),
    "bloom": _family(
        BloomForCausalLM,
        BloomConfig,
        lambda layers: COMMON | {"hidden_size": WIDTH, "n_layer": layers, "n_head": HEADS},
    ),
    "starcoder2": _family(Starcoder2ForCausalLM, Starcoder2Config, llama(tie_word_embeddings=True)),
    "cohere": _family(CohereForCausalLM, CohereConfig, llama(**COHERE)),
    "cohere_qk": _family(CohereForCausalLM, CohereConfig, llama(**COHERE, use_qk_norm=True)),
    "gpt_bigcode": known("gpt_bigcode", _gpt2()),
    "gpt_bigcode_heads": known("gpt_bigcode", _gpt2(multi_query=False)),
    "xglm": known("xglm", _xglm),
    "arcee": known("arcee", llama(attention_bias=True)),
    "nemotron": known("nemotron", llama(head_dim=8, rope_parameters=HALF_ROTARY)),
    "apertus": known("apertus", llama(rope_parameters=LLAMA3_ROPE)),
    "ernie4_5": known("ernie4_5", llama(use_bias=True)),
    "seed_oss": known("seed_oss", llama(head_dim=12, attention_out_bias=True)),
    "ministral": known("ministral", _windows(head_dim=12)),
    "helium": known("helium", llama(head_dim=8)),
    "glm": known("glm", llama(head_dim=8, rope_parameters=HALF_ROTARY, attention_bias=True)),
    "glm4": known("glm4", llama(head_dim=8, rope_parameters=HALF_ROTARY)),
    "olmo3": known("olmo3", _windows()),
    "olmoe": known("olmoe", _moe(intermediate_size=WIDTH, norm_topk_prob=True)),
    "granitemoe": known("granitemoe", llama(**GRANITE, num_local_experts=4, num_experts_per_tok=2)),
    "codegen": known("codegen", _gpt2(rotary_dim=4)),
    "mpt": known("mpt", _mpt),
    "olmo": known("olmo", llama(clip_qkv=0.7)),
    "smollm3": known("smollm3", lambda layers: llama_like(layers) | {"no_rope_layers": _rope(layers)}),
    "exaone4": known("exaone4", _windows(sliding_window_pattern=2)),
    "cohere2": known("cohere2", _windows(**COHERE)),
    "hunyuan_v1_dense": known("hunyuan_v1_dense", llama(head_dim=12)),
    "ministral3": known("ministral3", llama(head_dim=12, rope_parameters=LLAMA4_ROPE)),
    "gpt_oss": known("gpt_oss", _gpt_oss),
    "phimoe": known("phimoe", llama(num_local_experts=4, num_experts_per_tok=2, lm_head_bias=True)),
}

# Built of what others have that are tested everywhere: the usual tests ask only for their forward pass.
LIKE_OTHERS = frozenset(
    {
        *("gpt_bigcode", "gpt_bigcode_heads", "xglm", "arcee", "nemotron", "apertus", "ernie4_5", "seed_oss"),
        *("ministral", "helium", "glm", "glm4", "olmo3", "olmoe", "granitemoe", "phimoe"),
        *("codegen", "mpt", "exaone4", "cohere2"),
    }
)
# XGLM's own forward fills in a number that float64 makes overflow.
IN_FLOAT64 = tuple(family for family in ALL_FAMILIES if family != "xglm")
USUAL = tuple(family for family in ALL_FAMILIES if family not in LIKE_OTHERS)
