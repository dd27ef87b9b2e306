"""The check at load refuses a row of the table in which any one field is wrong, and what has no row."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
)

from pahq_hf import PAHQModel
from pahq_hf.errors import SelfCheckError, UnsupportedModelError
from pahq_hf.modeling.architectures.architecture import call
from pahq_hf.modeling.architectures.families import TABLE
from pahq_hf.modeling.architectures.lookup import find_architecture
from pahq_hf.modeling.architectures.position_embeddings import NO_ROTARY, ROTARY_TABLES, plain_bias
from tests.families import ALL_FAMILIES
from tests.helpers import FP32
from tests.tiers import exhaustive

pytestmark = pytest.mark.crossing

SWAPPED = {"qkv": ("k_proj", "q_proj", "v_proj")}
NO_SCALE = {"scaling": lambda attention: 1.0}

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"conv1d": False}, "does not run|differ"),
    ("gpt2", {"fused": "groups"}, "logits"),
    ("gpt2", {"mlp_norm": "ln_1"}, "MLP of layer 0"),
    ("gpt2", {"parallel": True}, "MLP of layer 0"),
    ("gpt2", {"final_norm": "transformer.h.0.ln_1"}, "differ|run"),
    ("gpt_neo", SWAPPED, "logits"),
    ("gpt_neo", {"score_bias": plain_bias}, "logits"),
    ("gpt_neo", {"scaling": lambda attention: attention.head_dim**-0.5}, "logits"),
    ("gptj", {"rotary": NO_ROTARY}, "logits"),
    ("gptj", {"rotary": ROTARY_TABLES}, "logits|run"),  # transformers 5.24 passes it tables
    ("gptj", NO_SCALE, "logits"),
    ("gptj", {"parallel": False}, "MLP of layer 0"),
    ("gpt_neox", {"parallel": False}, "MLP of layer 0 reads|differ"),
    ("gpt_neox", {"fused": "blocks"}, "logits"),
    ("gpt_neox", {"mlp_norm": "input_layernorm"}, "MLP of layer 0"),
    ("opt", SWAPPED, "logits"),
    ("opt", {"mlp_norm": "self_attn_layer_norm"}, "MLP of layer 0"),
    ("opt", {"mlp_exit": "fc1"}, "differ|run|shapes"),
    ("mixtral", {"mlp_norm": "input_layernorm"}, "MLP of layer 0"),
    ("qwen3", {"qk_norm": None}, "logits"),
    ("qwen3", {"qk_norm": ("k_norm", "q_norm")}, "logits"),
    ("qwen3_moe", {"qk_norm": None}, "logits"),
    ("gemma2", {"softcap": None}, "logits"),
    ("gemma2", {"logit_softcap": None}, "logits computed from the last stream"),
    ("gemma2", {"logit_softcap": 5.0}, "logits computed from the last stream"),
    ("gemma2", {"norm_offset": 0.0}, "heads of layer 0|the attention"),
    ("gemma2", {"attention_post_norm": None}, "stream"),
    ("gemma2", {"attention_post_norm": "post_feedforward_layernorm"}, "stream"),
    ("gemma2", {"mlp_post_norm": None}, "stream|MLP"),
    ("gemma2", {"mlp_post_norm": "post_attention_layernorm"}, "differ"),
    ("gemma2", {"mlp_norm": "post_attention_layernorm"}, "MLP"),
    ("gemma2", {"attention_norm": "pre_feedforward_layernorm"}, "heads of layer 0"),
    ("gemma3", {"qk_norm": None}, "logits"),
    ("gemma3", {"attention_norm": None}, "heads of layer 0"),
    ("phi", {"rotary": NO_ROTARY}, "logits"),
    ("phi", {"parallel": False}, "MLP of layer 0"),
    ("phi_qk", {"qk_norm": None}, "logits"),
    ("phi3", {"fused": "groups"}, "logits"),
    ("olmo2", {"joint_qk_norm": False}, "run"),
    ("olmo2", {"qk_norm": None}, "logits"),
    ("olmo2", {"attention_post_norm": None}, "stream"),
    ("olmo2", {"attention_norm": "post_attention_layernorm"}, "heads of layer 0"),
    ("stablelm", {"rotary": NO_ROTARY}, "logits"),
    ("stablelm", {"parallel": True}, "MLP of layer 0"),
    ("stablelm_parallel", {"qk_norm": None}, "logits"),
    ("granite", {"residual_multiplier": 1.0}, "stream"),
    ("granite", {"logit_scale": 1.0}, "logits computed from the last stream"),
    ("granite", NO_SCALE, "logits"),
    ("falcon", {"fused": "blocks", "kv_groups": 4}, "run|logits"),
    ("falcon", {"parallel": False}, "MLP of layer 0"),
    ("falcon_new", {"fused": "blocks"}, "logits"),
    ("falcon_new", {"mlp_norm": "ln_attn"}, "MLP of layer 0"),
    ("falcon_alibi", {"reference": "eager"}, "logits"),
    ("bloom", {"score_bias": plain_bias}, "logits"),
    ("bloom", {"adds_residual": False}, "logits"),
    ("bloom", {"mlp_exit": None}, "stream|MLP"),
    ("bloom", {"mlp_run": call}, "does not run"),
    ("bloom", NO_SCALE, "logits"),
    ("starcoder2", {"attention_norm": "post_attention_layernorm"}, "heads of layer 0"),
    ("cohere", {"logit_scale": 1.0}, "logits computed from the last stream"),
    ("cohere", {"parallel": False}, "MLP of layer 0"),
    ("cohere_qk", {"qk_norm": None}, "logits"),
    ("gpt_bigcode", {"kv_groups": 4}, "run|logits"),
    ("nemotron", {"mlp_linears": ("down_proj", "up_proj"), "mlp_exit": "mlp.up_proj"}, "run|shapes"),
    ("apertus", {"mlp_norm": "attention_layernorm"}, "MLP of layer 0"),
    ("glm4", {"mlp_post_norm": None}, "stream|MLP"),
    ("codegen", {"fused": "blocks"}, "logits"),
    ("mpt", {"score_bias": plain_bias}, "logits|run"),
    ("mpt", {"qkv_bound": None}, "logits"),
    ("smollm3", {"rotary": ROTARY_TABLES}, "logits"),
    ("hunyuan_v1_dense", {"norm_after_rotary": False}, "logits"),
    ("ministral3", {"rotary": ROTARY_TABLES}, "logits"),
    ("gpt_oss", {"sinks": None}, "logits"),
    ("gpt_oss", {"mlp_run": call}, "run"),
]
# Of families that are built like others.
WRONG_TOO: list[tuple[str, dict[str, Any], str]] = [
    ("gpt_bigcode_heads", {"fused": "blocks"}, "logits"),
    ("xglm", SWAPPED, "logits"),
    ("xglm", NO_SCALE, "logits"),
    ("xglm", {"mlp_norm": "self_attn_layer_norm"}, "MLP of layer 0"),
    ("arcee", {"qkv": ("q_proj", "v_proj", "k_proj")}, "logits"),
    ("nemotron", {"rotary": NO_ROTARY}, "logits"),
    ("apertus", {"qk_norm": None}, "logits"),
    ("ernie4_5", {"rotary": NO_ROTARY}, "logits"),
    ("seed_oss", {"qkv": ("q_proj", "v_proj", "k_proj")}, "logits"),
    ("ministral", NO_SCALE, "logits"),
    ("helium", {"mlp_norm": "input_layernorm"}, "MLP of layer 0"),
    ("glm", {"rotary": NO_ROTARY}, "logits"),
    ("glm4", {"attention_post_norm": None}, "stream"),
    ("glm4", {"mlp_norm": "post_mlp_layernorm"}, "MLP"),
    ("olmo3", {"joint_qk_norm": False}, "run"),
    ("olmoe", {"qk_norm": None}, "logits"),
    ("olmoe", {"joint_qk_norm": False}, "run"),
    ("granitemoe", {"residual_multiplier": 1.0}, "stream"),
    ("granitemoe", {"logit_scale": 1.0}, "logits computed from the last stream"),
    ("phimoe", {"mlp_norm": "input_layernorm"}, "MLP of layer 0"),
    ("codegen", {"parallel": False}, "MLP of layer 0"),
    ("mpt", {"mlp_exit": None}, "stream|MLP"),
    ("mpt", NO_SCALE, "logits"),
    ("olmo", {"qkv_bound": None}, "logits"),
    ("exaone4", {"rotary": NO_ROTARY}, "logits"),
    ("exaone4", {"rotary": ROTARY_TABLES}, "logits"),
    ("cohere2", {"rotary": ROTARY_TABLES}, "logits"),
    ("cohere2", {"logit_scale": 1.0}, "logits computed from the last stream"),
    ("hunyuan_v1_dense", {"qk_norm": None}, "logits"),
    ("ministral3", NO_SCALE, "logits"),
    ("gpt_oss", {"rotary": ROTARY_TABLES}, "run"),
    ("gpt_oss", {"rotary": NO_ROTARY}, "logits"),
]


@pytest.mark.parametrize(
    ("family", "change", "what"),
    [*WRONG, *(exhaustive(*case) for case in WRONG_TOO)],
    ids=[f"{family}-{'-'.join(change)}" for family, change, _ in (*WRONG, *WRONG_TOO)],
)
def test_a_wrong_field_is_refused(
    family: str, change: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = ALL_FAMILIES[family]()
    row = find_architecture(hf.config)
    monkeypatch.setitem(TABLE, row.model_type, lambda config: dataclasses.replace(row, **change))
    with pytest.raises(SelfCheckError, match=f"self-check failed: .*({what})"):
        PAHQModel(hf, FP32)


def test_a_wrong_offset_of_norms_is_refused_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no norm follows a block, only float64 models compute norms themselves."""
    hf = ALL_FAMILIES["gemma"](dtype=torch.float64)
    row = dataclasses.replace(find_architecture(hf.config), norm_offset=0.0)
    monkeypatch.setitem(TABLE, "gemma", lambda config: row)
    with pytest.raises(SelfCheckError, match="logits"):
        PAHQModel(hf, FP32)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": "model.blocks"},
        {"attention": "attn"},
        {"qkv": ("wq", "wk", "wv")},
        {"out": "dense"},
        {"attention_norm": "ln_1"},
        {"mlp_norm": "ln_2"},
        {"final_norm": "ln_f"},
        {"unembedding": "head"},
        {"qk_norm": ("q_norm", "k_norm")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_part_that_is_not_there_is_named(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hf = ALL_FAMILIES["llama"]()
    row = find_architecture(hf.config)
    monkeypatch.setitem(TABLE, "llama", lambda config: dataclasses.replace(row, **change))
    ((_, value),) = change.items()
    name = value if isinstance(value, str) else value[0]
    with pytest.raises(UnsupportedModelError, match=f"has no '{name}', where family 'llama' keeps"):
        PAHQModel(hf, FP32)


# -- what has no row --------------------------------------------------------------------------------


REFUSED = {
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "mamba": "state-space",
    "mamba2": "state-space",
    "falcon_mamba": "state-space",
    "jamba": "state-space",
    "bamba": "state-space",
    "zamba2": "state-space",
    "falcon_h1": "state-space",
    "nemotron_h": "state-space",
    "granitemoehybrid": "state-space",
    "qwen3_next": "state-space",
    "lfm2": "state-space",
    "recurrent_gemma": "state-space",
    "rwkv": "state-space",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "minicpm3": "multi-head latent attention",
    "bitnet": "a norm between its heads",
    "diffllama": "differences of two patterns",
    "gemma3n": "AltUp",
    "gemma3n_text": "AltUp",
    "gemma4_text": "multiply the stream",
    "bert": "'bert' is not supported",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_of_another_kind_are_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
        find_architecture(AutoConfig.for_model(model_type))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (OPTConfig(do_layer_norm_before=False), "OPT-350m"),
        (MptConfig(attn_config={"alibi": False}), "ALiBi anyway"),
        (BloomConfig(apply_residual_connection_post_layernorm=True), "adds normalised streams"),
        (Gemma3Config(), "its text model is of family 'gemma3_text'"),
    ],
    ids=["opt-350m", "mpt", "bloom", "gemma3"],
)
def test_variants_that_cannot_be_read_are_refused(config: PretrainedConfig, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        find_architecture(config)


def test_an_output_bias_under_a_norm_is_refused() -> None:
    from transformers import Gemma2ForCausalLM

    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 32)
    config = Gemma2Config(
        **sizes,
        attention_bias=True,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with pytest.raises(UnsupportedModelError, match="bias under a norm"):
        PAHQModel(Gemma2ForCausalLM(config), FP32)


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "bitsandbytes"])
def test_foreign_quantised_checkpoints_are_refused(method: str) -> None:
    config = ALL_FAMILIES["llama"]().config
    config.quantization_config = {"quant_method": method}
    with pytest.raises(UnsupportedModelError, match=f"quantised .{method}.*unquantised"):
        find_architecture(config)


def test_a_quantisation_given_as_an_object_is_refused() -> None:
    config = ALL_FAMILIES["llama"]().config
    config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        find_architecture(config)


def test_attention_that_looks_ahead_leaves_the_sparse_engine() -> None:
    assert find_architecture(Gemma3TextConfig()).sparse
    assert not find_architecture(Gemma3TextConfig(use_bidirectional_attention=True)).sparse
