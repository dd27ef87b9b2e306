"""Load a Hugging Face causal LM from an id, a folder or a GGUF file, and find its safetensors files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from pahq_hf.architectures import find_architecture
from pahq_hf.checkpoints import demo_path
from pahq_hf.errors import ConfigError, ModelLoadError, UnsupportedModelError

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")
_LOAD_ERRORS = (
    OSError,
    ValueError,
    HFValidationError,
    SafetensorError,
    KeyError,
    RuntimeError,
    ImportError,
    struct.error,  # a truncated GGUF file
    OverflowError,  # a damaged one
)


def resolve(name: str) -> str:
    """A model's name, with the bundled `demo` turned into its folder."""
    return str(demo_path()) if name == "demo" else name


def load_config(name: str, **kwargs: Any) -> PretrainedConfig:
    """A model's config, without its weights.

    Args:
        name: Hub id, folder, or `demo`.
        **kwargs: As for `AutoConfig.from_pretrained`, and `gguf_file`.

    Returns:
        The config of a supported family.

    Raises:
        ModelLoadError: If it cannot be read.
        UnsupportedModelError: If the family is not supported.
    """
    wanted = {
        key: kwargs[key] for key in (*_HUB_ARGUMENTS, "trust_remote_code", "gguf_file") if key in kwargs
    }
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(resolve(name), **wanted)
    except _LOAD_ERRORS as error:
        if "model type" in str(error) or "architecture" in str(error):
            raise UnsupportedModelError(
                f"cannot tell the family of {name!r}: {_first_line(error)}"
            ) from error
        raise ModelLoadError(f"cannot read the model {name!r}: {_first_line(error)}") from error
    find_architecture(config)
    return config


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """The Hugging Face model, in FP32 unless `dtype` says otherwise, with eager attention.

    Args:
        name: Hub id, folder, or `demo`.
        **kwargs: As for `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model.

    Raises:
        ModelLoadError: If the checkpoint is missing, incomplete or damaged.
        UnsupportedModelError: If the family is not supported.
        ConfigError: If another attention implementation than `eager` is asked for.
    """
    if kwargs.pop("attn_implementation", "eager") != "eager":
        raise ConfigError(
            "attn_implementation must be 'eager': attention is cut into heads and needs its explicit mask"
        )
    load_config(name, **kwargs)
    kwargs.setdefault("dtype", torch.float32)
    if kwargs.get("gguf_file"):
        from transformers import GgufConfig

        kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(name), attn_implementation="eager", output_loading_info=True, **kwargs
        )
    except _LOAD_ERRORS as error:
        raise ModelLoadError(f"cannot load the weights of {name!r}: {_first_line(error)}") from error
    model: PreTrainedModel
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelLoadError(
            f"the checkpoint {name!r} is incomplete: it lacks {len(missing)} tensors, such as {missing[0]}"
        )
    return model


def load_tokenizer(name: str, **kwargs: Any) -> Any | None:
    """The model's tokenizer, or None when its folder has none.

    Args:
        name: Hub id, folder, or `demo`.
        **kwargs: Hub arguments, `gguf_file` and `trust_remote_code` are passed on.
    """
    wanted = {
        key: kwargs[key] for key in (*_HUB_ARGUMENTS, "trust_remote_code", "gguf_file") if key in kwargs
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), **wanted)
    except _LOAD_ERRORS:
        return None  # a model without a tokenizer is fine: tasks may give token ids
    # Where there are no files, GPT-2's class makes a tokenizer that knows its special tokens only.
    return tokenizer if len(tokenizer) > len(set(tokenizer.all_special_ids)) else None


def safetensors_files(name: str, **kwargs: Any) -> list[Path]:
    """The checkpoint's safetensors files; empty when it has none (GGUF, pickled weights)."""
    if kwargs.get("gguf_file"):
        return []
    wanted = _pick(kwargs, *_HUB_ARGUMENTS)
    lenient = {"_raise_exceptions_for_missing_entries": False}
    source = resolve(name)
    single = cached_file(source, SAFE_WEIGHTS_NAME, **wanted, **lenient)
    if single is not None:
        return [Path(single)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **wanted, **lenient)
    if index is None:
        return []
    files, _ = get_checkpoint_shard_files(source, index, **wanted)
    return [Path(file) for file in files]


def _pick(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: arguments[name] for name in names if name in arguments}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
