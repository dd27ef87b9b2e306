"""Load a model without ever holding it in FP32.

The modules are made on the meta device. What stays resident (norms, biases, embeddings) is read tensor by
tensor; projections stay where they are, in the safetensors files, until each is quantised.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from pahq_hf.checkpoint.foreign import reading
from pahq_hf.errors import ModelLoadError
from pahq_hf.modeling.architectures.lookup import find_architecture
from pahq_hf.precision.fp32.source import CheckpointSource, stored_name
from pahq_hf.precision.memory import trim
from pahq_hf.precision.quiet import quiet_loggers

logger = logging.getLogger(__name__)


def say_loaded_whole(reason: str) -> None:
    """Warn whoever counts on the memory that low precision takes: for a while it takes FP32's."""
    logger.warning("%s: it is loaded in FP32 as a whole, and then quantised", reason)


def bare_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """A model of an unknown family without any memory; None where transformers makes no causal LM of it."""
    try:
        with quiet_loggers("transformers"), init_empty_weights():  # nobody will use this model
            hf: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # code that nobody knows: what it raises is no reason to fail elsewhere
        logger.debug("no model of %s can be made: %s", config.model_type, error)
        return None
    return hf


def load_skeleton(
    config: PretrainedConfig,
    source: CheckpointSource,
    device: torch.device,
    *,
    quantize_embeddings: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """A model whose projections have no memory yet; everything else is loaded, in FP32.

    Args:
        config: The model's config.
        source: Its safetensors files.
        device: Where resident tensors go.
        quantize_embeddings: Leave the embedding and the unembedding without memory too. Those of a BF16
            checkpoint are left so anyway: they can be read from there.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model, or None when the checkpoint does not name its tensors as the model does; then
        transformers has to load it.
    """
    if get_checkpoint_conversion_mapping(config.model_type) is not None:
        say_loaded_whole(f"checkpoints of {config.model_type} are rearranged at loading")
        return None
    with reading("cannot make the model that its config tells"):
        with init_empty_weights(include_buffers=False):
            hf: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
            )
        hf.tie_weights()
    absent = _absent(hf, source)
    if absent is not None:
        say_loaded_whole(f"the checkpoint has no {absent} as the model needs it")
        return None
    streamed = set(map(id, _projection_weights(hf)))
    if quantize_embeddings or _are_bf16(hf, source):
        streamed |= {id(table.weight) for table in _tables(hf)}
    for name, parameter in list(hf.named_parameters()):
        if id(parameter) not in streamed:
            value = stored_tensor(source, hf, name).to(device, torch.float32, copy=True)
            module, leaf = _place(hf, name)
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    for name, buffer in list(hf.named_buffers()):
        module, leaf = _place(hf, name)
        stored = stored_name(name, hf.base_model_prefix, source)
        if leaf in module._non_persistent_buffers_set:  # old checkpoints hold rotary tables; made afresh
            stored = None
        value = buffer if stored is None else source.whole(stored).to(buffer.dtype)
        module._buffers[leaf] = value.to(device, copy=stored is not None)
    hf.tie_weights()
    trim()
    return hf


def _absent(hf: PreTrainedModel, source: CheckpointSource) -> str | None:
    """A parameter that the checkpoint lacks, holds in another shape, or unties; None if all is well."""
    for name, parameter in hf.named_parameters():
        stored = stored_name(name, hf.base_model_prefix, source)
        if stored is None or source.shape(stored) != tuple(parameter.shape):
            return name
    for twin, origin in (getattr(hf, "all_tied_weights_keys", None) or {}).items():
        second = stored_name(twin, hf.base_model_prefix, source)
        first = stored_name(origin, hf.base_model_prefix, source)
        if first is None or (second is not None and not _equal(source, first, second)):
            return str(twin)
    return None


def _equal(source: CheckpointSource, first: str, second: str) -> bool:
    return first == second or torch.equal(source.whole(first), source.whole(second))


def _projection_weights(hf: PreTrainedModel) -> Iterator[Tensor]:
    row = find_architecture(hf.config)
    for block in row.find(hf, row.layers):
        for projection in row.projections(block):
            weight: Tensor = projection.weight  # type: ignore[assignment]
            yield weight


def _tables(hf: PreTrainedModel) -> tuple[Any, Any]:
    row = find_architecture(hf.config)
    return hf.get_input_embeddings(), row.find(hf, row.unembedding)


def _are_bf16(hf: PreTrainedModel, source: CheckpointSource) -> bool:
    names = {id(weight): name for name, weight in hf.named_parameters()}
    return all(stored_tensor(source, hf, names[id(t.weight)]).dtype == torch.bfloat16 for t in _tables(hf))


# -- reading ----------------------------------------------------------------------------------------


def stored_tensor(source: CheckpointSource, hf: PreTrainedModel, name: str) -> Tensor:
    """A parameter as it lies in the mapped file.

    Raises:
        ModelLoadError: If the checkpoint lacks it, or changed.
    """
    stored = stored_name(name, hf.base_model_prefix, source)
    if stored is None:
        raise ModelLoadError(f"the checkpoint lacks the tensor {name}")
    return source.whole(stored)


def _place(hf: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return hf.get_submodule(parent), leaf


@contextmanager
def borrowed(hf: PreTrainedModel, source: CheckpointSource, device: torch.device) -> Iterator[None]:
    """Inside, weights on the meta device come from the checkpoint while their module runs, and go again.

    Args:
        hf: A model from `load_skeleton`, not patched yet.
        source: Its safetensors files.
        device: Where weights go.
    """
    handles = []
    for name, module in hf.named_modules():
        missing = [leaf for leaf, weight in module.named_parameters(recurse=False) if weight.is_meta]
        if missing:
            origins = {leaf: _first_name(hf, f"{name}.{leaf}") for leaf in missing}
            handles += _borrow(module, origins, hf, source, device)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _borrow(
    module: nn.Module,
    origins: dict[str, str],
    hf: PreTrainedModel,
    source: CheckpointSource,
    device: torch.device,
) -> list[Any]:
    empty = {leaf: module._parameters[leaf] for leaf in origins}

    def fill(*_: Any) -> None:
        for leaf, name in origins.items():
            value = stored_tensor(source, hf, name).to(device, torch.float32)
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(empty)

    return [module.register_forward_pre_hook(fill), module.register_forward_hook(drop)]


def _first_name(hf: PreTrainedModel, name: str) -> str:
    """The name under which a checkpoint keeps a parameter that is tied to another."""
    tied: dict[str, str] = getattr(hf, "all_tied_weights_keys", None) or {}
    return tied.get(name, name)
