"""What cannot be read as writers and readers of one residual stream, and why."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from pahq_hf.errors import UnsupportedModelError

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_RECURRENT = {"rwkv", "mamba", "mamba2", "falcon_mamba", "xlstm", "jamba", "recurrent_gemma"}
READ_QUANTISED = ("fp8", "torchao")  # formats that are loaded as full precision
_STATE_SPACE = ("mamba_d_state", "ssm_state_size", "state_size", "mamba_n_heads", "conv_L_cache")

_GEMMA3N = "four streams (AltUp), branches beside attention, and embeddings that enter every layer"
_GEMMA4 = "layers that multiply the stream, or read keys and values of others, and embeddings in every layer"
_OTHERWISE = {  # what some families have that no graph of heads and MLPs can say
    "bitnet": "a norm between its heads and their output projection",
    "diffllama": "differences of two patterns, and a norm over pairs of heads, in its attention",
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
}


def check_is_transformer(config: PretrainedConfig) -> None:
    """Refuse what is no plain decoder-only transformer.

    Args:
        config: A Hugging Face config.

    Raises:
        UnsupportedModelError: Saying what it is instead.
    """
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: two residual streams; only decoder-only models are supported"
        )
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} with cross-attention is not a decoder-only model")
    if _has_states(config):
        raise UnsupportedModelError(
            f"{name} has state-space or other recurrent layers, which have no heads that read and write; "
            "only attention layers are supported"
        )
    if name in _OTHERWISE:
        raise UnsupportedModelError(
            f"{name} has {_OTHERWISE[name]}: it is no sum of what heads and MLPs read and write"
        )
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} has multi-head latent attention: its heads read one compressed key/value, not the stream"
        )


def quantised_by(config: PretrainedConfig) -> str | None:
    """The format in which a checkpoint's weights are quantised; None where they are not."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    facts = found if isinstance(found, dict) else found.to_dict()
    return str(getattr(facts.get("quant_method"), "value", facts.get("quant_method")))


def check_is_not_quantised(config: PretrainedConfig, *, loading: bool = True) -> None:
    """Refuse checkpoints in a foreign quantised format.

    Args:
        config: A Hugging Face config.
        loading: Whether weights are yet to be loaded: those of some formats are read as full precision.

    Raises:
        UnsupportedModelError: Naming the format.
    """
    method = quantised_by(config)
    known = ("gguf", *READ_QUANTISED) if loading else ("gguf",)
    if method is not None and method not in known:
        raise UnsupportedModelError(
            f"this checkpoint is quantised ({method[:40]}): load the unquantised one, "
            "weights get smaller through PAHQConfig instead"
        )


def _has_states(config: PretrainedConfig) -> bool:
    kinds = {
        *(getattr(config, "layer_types", None) or ()),
        *(getattr(config, "layers_block_type", None) or ()),
    }
    return (
        config.model_type in _RECURRENT
        or bool(kinds - _ATTENTION)
        or any(getattr(config, name, None) is not None for name in _STATE_SPACE)
    )
