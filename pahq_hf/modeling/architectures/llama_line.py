"""Rows of Llama's line: what differs from `Architecture`'s defaults, which are Llama's."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter

from torch import Tensor, nn
from transformers import PretrainedConfig

from pahq_hf.modeling.architectures.architecture import Architecture, RowOf
from pahq_hf.modeling.architectures.position_embeddings import SCALED_QUERIES, RotaryTables

_GATED = ("gate_proj", "up_proj", "down_proj")


def _llama(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type=config.model_type)


def _qwen3(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type=config.model_type, qk_norm=("q_norm", "k_norm"))


def _mixtral(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type=config.model_type, mlp_linears=(), experts="experts")


def _qwen2_moe(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="qwen2_moe",
        mlp_linears=(*_GATED, *(f"shared_expert.{name}" for name in _GATED)),
        experts="experts",
    )


def _qwen3_moe(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type="qwen3_moe", qk_norm=("q_norm", "k_norm"), experts="experts")


def _gemma(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type="gemma", norm_offset=1.0)


def _gemma2(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type=config.model_type,
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        softcap="attn_logit_softcapping",
        norm_offset=1.0,
        logit_softcap=config.final_logit_softcapping,
        sparse=not getattr(config, "use_bidirectional_attention", False),
    )


def _gemma3(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type=config.model_type,
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        qk_norm=("q_norm", "k_norm"),
        norm_offset=1.0,
        logit_softcap=config.final_logit_softcapping,
        sparse=not config.use_bidirectional_attention,
    )


def _olmo2(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type=config.model_type,
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
        qk_norm=("q_norm", "k_norm"),
        joint_qk_norm=True,
    )


def _exaone4(config: PretrainedConfig) -> Architecture:
    """Where some layers have windows, only those turn their queries and keys."""
    return Architecture(
        model_type="exaone4",
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
        qk_norm=("q_norm", "k_norm"),
        rotary=RotaryTables(turns=lambda attention: attention.sliding_window is None or attention.is_sliding),
    )


def _smollm3(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type="smollm3", rotary=RotaryTables(turns=attrgetter("use_rope")))


def _hunyuan(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="hunyuan_v1_dense",
        qk_norm=("query_layernorm", "key_layernorm"),
        norm_after_rotary=True,
    )


def _ministral3(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type="ministral3", rotary=SCALED_QUERIES)


def _gpt_oss(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="gpt_oss",
        sinks="sinks",
        rotary=RotaryTables(halves=True),
        mlp_linears=(),
        experts="experts",
        mlp_run=_without_choice,
    )


def _without_choice(mlp: nn.Module, x: Tensor) -> Tensor:
    """What GPT-OSS's experts make, without what its router chose."""
    result: Tensor = mlp(x)[0]
    return result


def _phi(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="phi",
        final_norm="model.final_layernorm",
        out="dense",
        qk_norm=("q_layernorm", "k_layernorm") if config.qk_layernorm else None,
        mlp_norm="input_layernorm",
        mlp_linears=("fc1", "fc2"),
        parallel=True,
    )


def _olmo(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type="olmo", qkv_bound=config.clip_qkv)


def _olmoe(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="olmoe",
        qkv_bound=config.clip_qkv,
        qk_norm=("q_norm", "k_norm"),
        joint_qk_norm=True,
        mlp_linears=(),
        experts="experts",
    )


def _phi3(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type="phi3", qkv=("qkv_proj",), mlp_linears=("gate_up_proj", "down_proj"))


def _stablelm(config: PretrainedConfig) -> Architecture:
    parallel = config.use_parallel_residual
    return Architecture(
        model_type="stablelm",
        qk_norm=("q_layernorm", "k_layernorm") if config.qk_layernorm else None,
        mlp_norm="input_layernorm" if parallel else "post_attention_layernorm",
        parallel=parallel,
    )


def _granite(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type=config.model_type,
        residual_multiplier=float(config.residual_multiplier),
        logit_scale=1.0 / float(config.logits_scaling),
    )


def _granitemoe(config: PretrainedConfig) -> Architecture:
    return replace(_granite(config), mlp="block_sparse_moe", mlp_linears=(), experts="experts")


def _glm(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type="glm", mlp_linears=("gate_up_proj", "down_proj"))


def _glm4(config: PretrainedConfig) -> Architecture:
    return replace(
        _glm(config),
        model_type="glm4",
        attention_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
    )


def _arcee(config: PretrainedConfig) -> Architecture:
    """MLPs without a gate."""
    return Architecture(model_type=config.model_type, mlp_linears=("up_proj", "down_proj"), mlp_gates=())


def _nemotron(config: PretrainedConfig) -> Architecture:
    return replace(_arcee(config), norm_offset=1.0)


def _apertus(config: PretrainedConfig) -> Architecture:
    return replace(
        _arcee(config),
        attention_norm="attention_layernorm",
        mlp_norm="feedforward_layernorm",
        qk_norm=("q_norm", "k_norm"),
    )


def _starcoder2(config: PretrainedConfig) -> Architecture:
    return Architecture(model_type="starcoder2", mlp_linears=("c_fc", "c_proj"))


def _cohere(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="cohere",
        qk_norm=("q_norm", "k_norm") if config.use_qk_norm else None,
        mlp_norm="input_layernorm",
        parallel=True,
        logit_scale=float(config.logit_scale),
    )


def _cohere2(config: PretrainedConfig) -> Architecture:
    """Only layers with windows turn their queries and keys."""
    return Architecture(
        model_type="cohere2",
        mlp_norm="input_layernorm",
        parallel=True,
        logit_scale=float(config.logit_scale),
        rotary=RotaryTables(turns=lambda attention: attention.sliding_window is not None),
    )


LLAMA_LINE: dict[str, RowOf] = {
    "apertus": _apertus,
    "arcee": _arcee,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "ernie4_5": _llama,
    "exaone4": _exaone4,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "glm": _glm,
    "glm4": _glm4,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "granitemoe": _granitemoe,
    "helium": _llama,
    "hunyuan_v1_dense": _hunyuan,
    "llama": _llama,
    "ministral": _llama,
    "ministral3": _ministral3,
    "mistral": _llama,
    "mixtral": _mixtral,
    "nemotron": _nemotron,
    "olmo": _olmo,
    "olmo2": _olmo2,
    "olmo3": _olmo2,
    "olmoe": _olmoe,
    "phi": _phi,
    "phi3": _phi3,
    "phimoe": _mixtral,
    "qwen2": _llama,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "seed_oss": _llama,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
