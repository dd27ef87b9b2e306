"""Rows of GPT-2's line: families with layouts of their own."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from pahq_hf.errors import UnsupportedModelError
from pahq_hf.modeling.architectures.architecture import Architecture, RowOf
from pahq_hf.modeling.architectures.position_embeddings import (
    GPTJ_ROTARY,
    NO_ROTARY,
    alibi_bias,
    local_bias,
    mpt_bias,
)

_BLOCKS, _FINAL_NORM = "transformer.h", "transformer.ln_f"  # of all that follow GPT-2's layout


def _gpt2(config: PretrainedConfig) -> Architecture:
    """A GPT-2 whose MLPs have no neurons counts as attention-only: they add a constant, their bias."""
    return Architecture(
        model_type="gpt2",
        kv_groups=config.num_attention_heads,
        layers=_BLOCKS,
        final_norm=_FINAL_NORM,
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("c_attn",),
        out="c_proj",
        mlp_linears=("c_fc", "c_proj"),
        conv1d=True,
        rotary=NO_ROTARY,
        mlps=config.n_inner != 0,
    )


def _gpt_bigcode(config: PretrainedConfig) -> Architecture:
    """StarCoder: one key and value for all heads, or (not `multi_query`) one for each."""
    return Architecture(
        model_type="gpt_bigcode",
        kv_groups=1 if config.multi_query else config.num_attention_heads,
        layers=_BLOCKS,
        final_norm=_FINAL_NORM,
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("c_attn",),
        fused="groups",
        out="c_proj",
        mlp_linears=("c_fc", "c_proj"),
        rotary=NO_ROTARY,
    )


def _gpt_neo(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="gpt_neo",
        kv_groups=config.num_attention_heads,
        layers=_BLOCKS,
        final_norm=_FINAL_NORM,
        attention="attn.attention",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        out="out_proj",
        mlp_linears=("c_fc", "c_proj"),
        rotary=NO_ROTARY,
        score_bias=local_bias,
        scaling=lambda attention: 1.0,
    )


def _gptj_scaling(attention: Any) -> float:
    """GPT-J's factor of the scores, which transformers before 5.24 keeps as a divisor."""
    return float(attention.scaling) if hasattr(attention, "scaling") else 1.0 / float(attention.scale_attn)


def _gptj(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="gptj",
        kv_groups=config.num_attention_heads,
        layers=_BLOCKS,
        final_norm=_FINAL_NORM,
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_1",
        out="out_proj",
        mlp_linears=("fc_in", "fc_out"),
        rotary=GPTJ_ROTARY,
        scaling=_gptj_scaling,
        parallel=True,
    )


def _codegen(config: PretrainedConfig) -> Architecture:
    return replace(_gptj(config), model_type="codegen", qkv=("qkv_proj",), fused="quarters")


def _mpt(config: PretrainedConfig) -> Architecture:
    if not config.attn_config.alibi:
        raise UnsupportedModelError(
            "this MPT learned its positions (attn_config.alibi is false); transformers adds ALiBi anyway"
        )
    return Architecture(
        model_type="mpt",
        kv_groups=config.num_attention_heads,
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        attention="attn",
        attention_norm="norm_1",
        qkv=("Wqkv",),
        qkv_bound=config.attn_config.clip_qkv,
        out="out_proj",
        mlp="ffn",
        mlp_norm="norm_2",
        mlp_linears=("up_proj", "down_proj"),
        mlp_gates=(),
        mlp_run=_residual_mlp,
        mlp_exit="ffn.down_proj",
        rotary=NO_ROTARY,
        score_bias=mpt_bias,
        scaling=attrgetter("softmax_scale"),
    )


def _gpt_neox(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="gpt_neox",
        kv_groups=config.num_attention_heads,
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        unembedding="lm_head",
        attention="attention",
        qkv=("query_key_value",),
        fused="groups",
        out="dense",
        mlp_linears=("dense_h_to_4h", "dense_4h_to_h"),
        parallel=config.use_parallel_residual,
    )


def _opt(config: PretrainedConfig) -> Architecture:
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise UnsupportedModelError(
            "this OPT normalises after its blocks (OPT-350m): its stream is not a sum of what blocks write"
        )
    return Architecture(
        model_type="opt",
        kv_groups=config.num_attention_heads,
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        out="out_proj",
        mlp="",
        mlp_norm="final_layer_norm",
        mlp_linears=("fc1", "fc2"),
        mlp_run=_opt_mlp,
        mlp_exit="fc2",
        rotary=NO_ROTARY,
    )


def _xglm(config: PretrainedConfig) -> Architecture:
    return Architecture(
        model_type="xglm",
        kv_groups=config.num_attention_heads,
        final_norm="model.layer_norm",
        attention_norm="self_attn_layer_norm",
        out="out_proj",
        mlp="",
        mlp_norm="final_layer_norm",
        mlp_linears=("fc1", "fc2"),
        mlp_run=_opt_mlp,
        mlp_exit="fc2",
        rotary=NO_ROTARY,
    )


def _opt_mlp(layer: nn.Module, x: Tensor) -> Tensor:
    """The MLP of OPT and XGLM lies in its layer."""
    result: Tensor = layer.fc2(layer.activation_fn(layer.fc1(x)))  # type: ignore[operator]
    return result


def _bloom(config: PretrainedConfig) -> Architecture:
    if config.apply_residual_connection_post_layernorm or (
        config.pretraining_tp > 1 and config.slow_but_exact
    ):
        raise UnsupportedModelError(
            "this BLOOM adds normalised streams (apply_residual_connection_post_layernorm), or splits its "
            "products (slow_but_exact): neither is supported"
        )
    return Architecture(
        model_type="bloom",
        kv_groups=config.num_attention_heads,
        layers=_BLOCKS,
        final_norm=_FINAL_NORM,
        attention="self_attention",
        qkv=("query_key_value",),
        fused="groups",
        out="dense",
        mlp_linears=("dense_h_to_4h", "dense_4h_to_h"),
        mlp_run=_residual_mlp,
        mlp_exit="mlp.dense_4h_to_h",
        rotary=NO_ROTARY,
        score_bias=alibi_bias,
        scaling=attrgetter("inv_norm_factor"),
        adds_residual=True,
    )


def _residual_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """The MLP of BLOOM and MPT adds the stream itself; here to nothing."""
    result: Tensor = mlp(x, torch.zeros_like(x))
    return result


def _falcon(config: PretrainedConfig) -> Architecture:
    """Falcon-RW (sequential, ALiBi in its mask), Falcon-7B (parallel, one norm), -40B and -11B (groups)."""
    groups = config.num_attention_heads
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
    elif config.multi_query:
        groups = 1
    parallel = config.new_decoder_architecture or config.parallel_attn
    norms = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    if not parallel:
        attention_norm, mlp_norm = "input_layernorm", "post_attention_layernorm"
    elif norms == 2:
        attention_norm, mlp_norm = "ln_attn", "ln_mlp"
    else:
        attention_norm = mlp_norm = "input_layernorm"
    return Architecture(
        model_type="falcon",
        layers=_BLOCKS,
        final_norm=_FINAL_NORM,
        attention="self_attention",
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
        qkv=("query_key_value",),
        fused="groups",
        out="dense",
        mlp_linears=("dense_h_to_4h", "dense_4h_to_h"),
        scaling=attrgetter("inv_norm_factor"),
        rotary=NO_ROTARY if config.alibi else Architecture.rotary,
        parallel=parallel,
        kv_groups=groups,
        # ALiBi is in the mask; the eager forward of transformers 5 adds it to the scores once more.
        reference="sdpa" if config.alibi else "eager",
    )


GPT_LINE: dict[str, RowOf] = {
    "bloom": _bloom,
    "codegen": _codegen,
    "falcon": _falcon,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "mpt": _mpt,
    "opt": _opt,
    "xglm": _xglm,
}
