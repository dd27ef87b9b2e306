"""Names that stand for a saved configuration, and so for the base model in it: what an adapter is to PEFT."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pahq_hf.checkpoint.adapters import Adapter, find_adapter, is_local_adapter, merge
from pahq_hf.checkpoint.load import load, load_config, load_tokenizer
from pahq_hf.checkpoint.placement import one_device
from pahq_hf.checkpoint.streaming import say_loaded_whole
from pahq_hf.circuit.naming import is_place
from pahq_hf.config import CONFIG_NAME, PAHQConfig
from pahq_hf.errors import ConfigError, HubError, ModelLoadError, UnsupportedModelError
from pahq_hf.modeling.lowering import check_lowerable
from pahq_hf.precision.fp32.source import WeightSource
from pahq_hf.precision.products import resolve_compute

_PLACE = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")


def find_saved_config(name: str, arguments: dict[str, Any]) -> PAHQConfig | None:
    """The configuration that a name stands for, if it is one and not a model itself.

    Args:
        name: Folder or Hub id.
        arguments: As for `PAHQModel.from_pretrained`.

    Returns:
        The configuration, or None.

    Raises:
        ConfigError: If it is damaged.
    """
    folder = Path(name)
    if os.path.isdir(folder):
        alone = (folder / CONFIG_NAME).is_file() and not (folder / "config.json").exists()
        return PAHQConfig.from_pretrained(folder) if alone else None
    try:
        return PAHQConfig.from_pretrained(name, **{key: arguments[key] for key in _PLACE if key in arguments})
    except HubError:
        return None


@dataclass(frozen=True)
class LoadedModel:
    """A model by its name, before it is patched.

    Attributes:
        model: The model; its parameters may be empty still.
        tokenizer: Its tokenizer.
        source: Where its weights can be read again.
        config: How it is to be patched.
        name: What it was loaded by: the base model's name, if a saved configuration named one.
        adapter: The adapter of that name, which is merged into the weights.
    """

    model: PreTrainedModel
    tokenizer: Any
    source: WeightSource | None
    config: PAHQConfig
    name: str
    adapter: Adapter | None = None


def load_by_name(
    name: str,
    given: PAHQConfig | None,
    fields: dict[str, Any],
    arguments: dict[str, Any],
    through: tuple[str, ...] = (),
) -> LoadedModel:
    """Load a model, or the base model of a saved configuration.

    Args:
        name: Hub id, folder, or `demo`; of a model, or of what `PAHQModel.save_pretrained` wrote.
        given: How it is to be patched; by default as was saved with it.
        fields: Fields of the configuration that are given anew.
        arguments: As for `AutoModelForCausalLM.from_pretrained`.
        through: Names of saved configurations that led to this one.

    Returns:
        The model and how to patch it.

    Raises:
        ModelLoadError: If the checkpoint is missing or damaged.
        UnsupportedModelError: If the family is unknown.
        ConfigError: If a saved configuration is damaged, or leads back to itself.
    """
    config = given or PAHQConfig(**fields)
    _check_loadable(config, arguments)
    if is_local_adapter(name):
        return _load_adapted(name, config, arguments)
    try:
        model, source = load(
            name, streamed=config.is_low, quantize_embeddings=config.quantize_embeddings, **arguments
        )
    except (ModelLoadError, UnsupportedModelError):
        saved = find_saved_config(name, arguments)
        if saved is None or saved.base_model is None:
            if not is_place(name) and find_adapter(name, arguments) is not None:
                return _load_adapted(name, config, arguments)
            raise
        rest = _of_base(arguments, saved.revision)
        through = (*through, _place_of(name))
        if _place_of(saved.base_model) in through:
            raise ConfigError(
                f"the base model of the configuration in {name} is that configuration itself"
            ) from None
        return load_by_name(saved.base_model, given or saved.with_fields(fields), {}, rest, through)
    return LoadedModel(model, load_tokenizer(name, **arguments), source, config, name)


def load_config_of(name: str, **arguments: Any) -> PretrainedConfig:
    """A model's config, without its weights; of an adapter that of its base.

    Args:
        name: Hub id, folder, or `demo`.
        **arguments: As for `load_config`.

    Returns:
        The config of a supported family.

    Raises:
        ModelLoadError: If it cannot be read.
        UnsupportedModelError: If the family is not supported.
    """
    adapter = find_adapter(name, arguments) if is_local_adapter(name) else None
    if adapter is None:
        return load_config(name, **arguments)
    return load_config(adapter.base, **_of_base(arguments, adapter.base_revision))


def _load_adapted(name: str, config: PAHQConfig, arguments: dict[str, Any]) -> LoadedModel:
    """The base of an adapter, as a whole, with the adapter merged."""
    adapter = find_adapter(name, arguments)
    assert adapter is not None  # somebody looked
    rest = _of_base(arguments, adapter.base_revision)
    try:
        model, _ = load(adapter.base, streamed=False, **rest)
    except (ModelLoadError, UnsupportedModelError) as error:
        raise type(error)(f"{error} (the base model of the adapter {name!r})") from error
    merge(model, adapter)
    if config.is_low:
        say_loaded_whole(f"{name}: an adapter is merged into its weights")
    tokenizer = load_tokenizer(name, **arguments) or load_tokenizer(adapter.base, **rest)
    return LoadedModel(model, tokenizer, None, config, name, adapter)


def _of_base(arguments: dict[str, Any], revision: str | None) -> dict[str, Any]:
    """Arguments for the base model: revision and subfolder are those of what names it."""
    rest = {key: value for key, value in arguments.items() if key != "subfolder"}
    return rest | {"revision": revision}


def _place_of(name: str) -> str:
    """A folder however it is named, or the id of what is none."""
    return os.path.realpath(name) if os.path.exists(name) else name


def _check_loadable(config: PAHQConfig, arguments: dict[str, Any]) -> None:
    """Check what of a configuration needs no weights, before anybody waits for them.

    Raises:
        ConfigError: If the dtype or the device is none for it.
    """
    dtype = arguments.get("dtype", torch.float32)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)  # `auto` is none: the checkpoint will say
    if config.is_low and isinstance(dtype, torch.dtype):
        check_lowerable(dtype)
    if config.compute == "fp8":
        device = one_device(arguments.get("device_map"), arguments.get("max_memory"))
        resolve_compute(config.compute, config.format, device)
