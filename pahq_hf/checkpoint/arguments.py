"""Keyword arguments that loading a model takes, by name and type."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from pahq_hf.checkpoint.placement import usable_device
from pahq_hf.config import Active, Compute, PAHQConfig, Regime
from pahq_hf.errors import ConfigError, check_names, describe


class LoadOptions(TypedDict, total=False):
    """How a model is loaded: as transformers spells it, and as the command line does.

    Attributes:
        precision: Regime, in place of a `PAHQConfig`; so are all up to `quantize_embeddings`.
        format: Low-precision format.
        split_kv_groups: Give each query head key and value readers of its own.
        active: What is FP32 while an edge is tested.
        compute: Dtype of products with differences.
        policy: Formats of some components, by pattern.
        quantize_embeddings: Embedding and unembedding in low precision too.
        device: Where the whole model goes: `cpu`, `cuda:0`.
        base_model: The model's id on the Hub, stored with circuits in place of a local folder's name.
        assume_family: Known family by whose row the model is read, if its own family has none.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        cache_dir: Where downloads go.
        force_download: Download again what is in the cache.
        local_files_only: Do not reach the Hub.
        subfolder: Folder inside the repository.
        variant: Of the weight files, such as `fp16` in `model.fp16.safetensors`.
        use_safetensors: False loads pickled weights where there are both, True nothing else.
        gguf_file: GGUF file inside the model's folder or repository.
        dtype: Of the weights: float32, or float64 in regime fp32.
        torch_dtype: Its older name.
        device_map: Where parts of the model go, in place of `device`.
        max_memory: With `device_map="auto"`, which GPUs count: those that it gives bytes.
        trust_remote_code: Run code that comes with the model.
        attn_implementation: `eager`, and nothing else.
    """

    precision: Regime
    format: str
    split_kv_groups: bool
    active: Active
    compute: Compute
    policy: Mapping[str, str]
    quantize_embeddings: bool
    device: str | torch.device
    base_model: str
    assume_family: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    force_download: bool
    local_files_only: bool
    subfolder: str
    variant: str | None
    use_safetensors: bool | None
    gguf_file: str | None
    dtype: torch.dtype | str | None
    torch_dtype: torch.dtype | str | None
    device_map: Any
    max_memory: dict[Any, Any] | None
    trust_remote_code: bool | None
    attn_implementation: Literal["eager"]


PRECISION_KEYWORDS = {  # keyword -> field of `PAHQConfig`
    "precision": "regime",
    "format": "format",
    "split_kv_groups": "split_kv_groups",
    "active": "active",
    "compute": "compute",
    "policy": "policy",
    "quantize_embeddings": "quantize_embeddings",
}
_QUANTISED = "weights are quantised by precision='pahq' with format='fp8', 'int8', 'bf16' or 'mx'"
_OURSELVES = "load the model yourself and wrap it: PAHQModel(model)"
_LOAD_HINTS = {
    "regime": "did you mean 'precision'?",
    "fmt": "did you mean 'format'?",
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "quantization_config": _QUANTISED,
    "use_auth_token": "did you mean 'token'?",
    "low_cpu_mem_usage": "weights are read one by one anyway: leave it out",
    "tokenizer": f"to give one, {_OURSELVES.removesuffix(')')}, tokenizer=tokenizer)",
    **dict.fromkeys(
        ("offload_folder", "offload_state_dict", "offload_buffers"),
        "offloaded weights are out of reach: give a device_map that offloads nothing",
    ),
    **dict.fromkeys(
        ("n", "seed", "task", "threshold", "metric"), "it is no property of a model: give it to discover"
    ),
}


def read_load_options(
    given: Mapping[str, Any], config: PAHQConfig | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what `from_pretrained` was given.

    Args:
        given: Its keyword arguments.
        config: The configuration it was given.

    Returns:
        Arguments of transformers, and fields of `PAHQConfig`.

    Raises:
        ConfigError: If a name is unknown, or two arguments say the same thing.
    """
    known: list[str] = sorted(LoadOptions.__annotations__)
    check_names(given, known, "from_pretrained", _LOAD_HINTS, otherwise=f"for others {_OURSELVES}")
    if config is not None and not isinstance(config, PAHQConfig):
        raise ConfigError(f"pahq_config must be a PAHQConfig; got {config!r}: is it precision={config!r}?")
    arguments = {name: value for name, value in given.items() if name not in PRECISION_KEYWORDS}
    fields = {field: given[name] for name, field in PRECISION_KEYWORDS.items() if name in given}
    if config is not None and fields:
        raise ConfigError("give either pahq_config or its fields as keywords, not both")
    if "torch_dtype" in arguments:
        if "dtype" in arguments:
            raise ConfigError("give either dtype or torch_dtype, its older name, not both")
        arguments["dtype"] = arguments.pop("torch_dtype")
    if arguments.get("dtype", torch.float32) is None:
        del arguments["dtype"]
    device = arguments.pop("device", None)
    if device is not None:
        if arguments.get("device_map") is not None:
            raise ConfigError("give either device or device_map, not both")
        arguments["device_map"] = {"": usable_device(device)}
    return arguments, fields


def check_model(model: object) -> None:
    """Check that `PAHQModel` was given a model.

    Raises:
        ConfigError: If it is something else, such as a model's name.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"PAHQModel wraps a loaded model; got {describe(model)}: load one by its name with "
            "PAHQModel.from_pretrained(...)"
        )
