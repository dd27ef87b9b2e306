"""Keyword arguments that methods of `PAHQModel` take, by name and type."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.config import (
    Ablation,
    Active,
    Compute,
    Format,
    MethodName,
    MetricName,
    Order,
    PAHQConfig,
    Regime,
)
from pahq_hf.errors import ConfigError, check_names, describe
from pahq_hf.tasks.base import Task


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
    format: Format
    split_kv_groups: bool
    active: Active
    compute: Compute
    policy: Mapping[str, Format]
    quantize_embeddings: bool
    device: str | torch.device
    base_model: str
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


class SweepOptions(TypedDict, total=False):
    """Fields of `ACDCConfig` but for the threshold."""

    metric: MetricName | None
    order: Order
    ablation: Ablation
    absolute: bool
    readers: str | None
    margin: float | None
    screen: str | None


class DiscoverOptions(SweepOptions, total=False):
    """Fields of `ACDCConfig`."""

    threshold: float


class AttributeOptions(TypedDict, total=False):
    """Fields of `AttributionConfig`."""

    method: MethodName
    metric: MetricName | None
    steps: int
    topn: int | None
    threshold: float | None
    absolute: bool
    ablation: Ablation
    seed: int


class EvaluateOptions(TypedDict, total=False):
    """Fields of `evaluation.EvaluationOptions`."""

    curve: bool
    minimality: bool
    completeness: bool
    samples: int
    seed: int
    reference: Circuit | None


_FIELDS = {  # keyword -> field of `PAHQConfig`
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
_AT_LOADING = "precision is chosen when the model is loaded: PAHQModel.from_pretrained(..., {}=...)"
_ENGINE = "the engine is described by engine=EngineConfig({}=...)"
_WORK_HINTS = {
    **{name: _AT_LOADING.format(name) for name in (*_FIELDS, "device", "dtype", "base_model")},
    **{name: _ENGINE.format(name) for name in ("batch", "memory_budget", "activation_store")},
    "n": "prompts are chosen with the task: load_task(..., n=...)",
    "tau": "did you mean 'threshold'?",
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
    arguments = {name: value for name, value in given.items() if name not in _FIELDS}
    fields = {field: given[name] for name, field in _FIELDS.items() if name in given}
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


def usable_device(device: str | int | torch.device) -> torch.device:
    """A device by its name.

    Raises:
        ConfigError: If there is none of this name on this machine.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"device {str(device)!r} cannot be used: {reason}") from error


def check_work(
    options: Mapping[str, Any], known: Iterable[str], method: str, **objects: tuple[object, type]
) -> None:
    """Check what a method of `PAHQModel` was given.

    Args:
        options: Its keyword arguments.
        known: The names there are.
        method: Its name.
        **objects: Configurations by the names of their arguments, and the classes they must have.

    Raises:
        ConfigError: If a name is unknown, or a configuration is something else.
    """
    check_names(options, list(known), method, _WORK_HINTS)
    for name, (value, kind) in objects.items():
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} must be an instance of {kind.__name__}; got {value!r}")


def check_task(task: object, method: str) -> None:
    """Check that a method of `PAHQModel` was given a task.

    Raises:
        ConfigError: If it is something else, such as a task's name.
    """
    if not isinstance(task, Task):
        raise ConfigError(f"{method} takes a Task (load_task(...)); got {describe(task)}")


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
