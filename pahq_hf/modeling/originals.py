"""The weights of a patched model as its checkpoint has them: original names, layouts and FP32 values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from pahq_hf.errors import ConfigError, UnsupportedModelError
from pahq_hf.modeling.attention import PAHQAttention
from pahq_hf.modeling.experts import PAHQExperts
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.modeling.projections import qkv_ranges
from pahq_hf.precision.embeddings import EmbeddingMatrix
from pahq_hf.precision.fp32.source import CheckpointSource
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.weights import WeightMatrix

Read = Callable[[], Tensor]


def original_tensors(model: PatchedModel) -> dict[str, Read]:
    """What the model's state was before it was patched.

    Args:
        model: The patched model, in any precision.

    Returns:
        By the original names and in their order, what reads each parameter and persistent buffer: in the
        checkpoint's dtype where it is read from there. Tied parameters appear once.

    Raises:
        UnsupportedModelError: If something of the original cannot be told any more.
    """
    found: dict[str, Read] = {}
    inside: list[str] = []  # modules that patching put there
    for name, module in model.hf.named_modules():
        if isinstance(module, PAHQAttention):
            found |= _attention(name, module)
            inside += [f"{name}.{kind}_proj." for kind in "qkvo"]
        elif isinstance(module, PAHQExperts):
            found |= _experts(name, module)
            inside += [f"{name}.gate_up.", f"{name}.down."]
        elif isinstance(module, EmbeddingMatrix):
            inside.append(f"{name}.")
        elif isinstance(module, PAHQLinear) and not f"{name}.".startswith(tuple(inside)):
            found |= _projection(name, module, model.arch.conv1d)
            inside.append(f"{name}.")
    if model.embedding_matrices:
        found |= _projection(model.arch.unembedding, model.embedding_matrices[0], False)
        found[f"{model.name_of(model.embedding)}.weight"] = _weight(model.embedding_matrices[-1])
    for name, tensor in model.hf.state_dict(keep_vars=True).items():
        if not name.startswith(tuple(inside)):
            found.setdefault(name, tensor.detach)
    lost = [name for name in model.original_shapes if name not in found]
    if lost:
        raise UnsupportedModelError(
            f"the original weights of this patched model cannot be told any more: {lost[0]} is gone; load "
            "the checkpoint anew"
        )
    return {name: found[name] for name in model.original_shapes}


def _attention(name: str, module: PAHQAttention) -> dict[str, Read]:
    row = module.row
    linears = (module.q_proj, module.k_proj, module.v_proj)
    found = _projection(f"{name}.{row.out}", module.o_proj, row.conv1d)
    if len(row.qkv) == 3:
        for own, linear in zip(row.qkv, linears, strict=True):
            found |= _projection(f"{name}.{own}", linear, row.conv1d)
        return found
    rows = sum(linear.out_features for linear in linears)
    ranges = qkv_ranges(row, rows, module.n_heads, module.n_groups)

    def fused(parts: list[Tensor], transposed: bool) -> Tensor:
        whole = parts[0].new_empty(rows, *parts[0].shape[1:])
        for kind, part in zip("qkv", parts, strict=True):
            offset = 0
            for start, stop in ranges[kind]:
                whole[start:stop] = part[offset : offset + stop - start]
                offset += stop - start
        return whole.t().contiguous() if transposed else whole

    def weight() -> Tensor:
        shape = (rows, linears[0].in_features)
        stored = _stored(linears[0], shape[::-1] if row.conv1d else shape)
        return fused([_dense(linear) for linear in linears], row.conv1d) if stored is None else stored

    found[f"{name}.{row.qkv[0]}.weight"] = weight
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases:
        found[f"{name}.{row.qkv[0]}.bias"] = lambda: fused([bias.detach() for bias in biases], False)
    return found


def _experts(name: str, module: PAHQExperts) -> dict[str, Read]:
    found: dict[str, Read] = {}
    for leaf, linears in (("gate_up_proj", module.gate_up), ("down_proj", module.down)):
        found[f"{name}.{leaf}"] = partial(_stacked, module, linears)
        if linears[0].bias is not None:
            found[f"{name}.{leaf}_bias"] = partial(_stacked_biases, linears)
    return found


def _stacked(module: PAHQExperts, linears: nn.ModuleList) -> Tensor:
    whole = torch.stack([_dense(linear) for linear in linears])  # type: ignore[arg-type]
    return whole.transpose(1, 2).contiguous() if getattr(module, "is_transposed", False) else whole


def _stacked_biases(linears: nn.ModuleList) -> Tensor:
    return torch.stack([linear.bias.detach() for linear in linears])  # type: ignore[operator]


def _projection(name: str, linear: WeightMatrix, transposed: bool) -> dict[str, Read]:
    found: dict[str, Read] = {f"{name}.weight": _weight(linear, transposed)}
    if linear.bias is not None:
        found[f"{name}.bias"] = linear.bias.detach
    return found


def _weight(linear: WeightMatrix, transposed: bool = False) -> Read:
    def read() -> Tensor:
        shape = (linear.out_features, linear.in_features)
        stored = _stored(linear, shape[::-1] if transposed else shape)
        if stored is not None:
            return stored
        weight = _dense(linear)
        return weight.t().contiguous() if transposed else weight

    return read


def _stored(linear: WeightMatrix, shape: tuple[int, int]) -> Tensor | None:
    """The checkpoint's own tensor, mapped from the file, where a low-precision weight was read from it."""
    block = linear.source_block
    if block is None or not isinstance(block.source, CheckpointSource):
        return None
    if block.source.shape(block.name) != shape:
        return None
    return block.source.whole(block.name)


def _dense(linear: WeightMatrix) -> Tensor:
    return linear.exact().detach()


def unpatched(model: PatchedModel) -> PreTrainedModel:
    """The model as it was before it was patched, as another one.

    Args:
        model: The patched model, which stays as it is.

    Returns:
        A model of the same class, with weights of its own, in full precision and in eval mode.

    Raises:
        UnsupportedModelError: If the original weights cannot be told any more.
    """
    hf, device = model.hf, model.device
    with init_empty_weights(include_buffers=False):
        twin: PreTrainedModel = type(hf)._from_config(
            deepcopy(hf.config), dtype=hf.dtype, attn_implementation="eager"
        )
    twin.tie_weights()
    for name, read in original_tensors(model).items():
        parent, _, leaf = name.rpartition(".")
        module, value = twin.get_submodule(parent), read().to(device, copy=True)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value.to(hf.dtype))
        else:
            module._buffers[leaf] = value
    twin.tie_weights()
    for module in twin.modules():  # those that no checkpoint keeps were made anew
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers[leaf]
            module._buffers[leaf] = None if buffer is None else buffer.to(device)
    twin.generation_config = deepcopy(hf.generation_config)
    return twin.eval()


# -- checkpoints --------------------------------------------------------------------------------------


class OriginalCheckpoint:
    """Lets the Hugging Face model inside a patched one write the checkpoint it came from.

    Its own `save_pretrained` would write projections under the names and in the shapes that patching gave
    them: nothing could read that.

    Args:
        model: The patched model.
    """

    def __init__(self, model: PatchedModel) -> None:
        self._model = model

    def install(self) -> None:
        """Let `save_pretrained` and `push_to_hub` of the Hugging Face model write the original."""
        self._model.hf.save_pretrained = self.save_pretrained  # type: ignore[method-assign]

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *arguments: Any,
        **options: Any,
    ) -> None:
        """Write the model as it was before it was patched, in full precision.

        Args:
            save_directory: The folder.
            is_main_process: As for `PreTrainedModel.save_pretrained`.
            state_dict: Other weights, under the original names.
            *arguments: As for `PreTrainedModel.save_pretrained`.
            **options: Likewise.

        Raises:
            ConfigError: If `state_dict` has names that patching gave.
            UnsupportedModelError: If the original weights cannot be told any more.
        """
        hf = self._model.hf
        if state_dict is None:
            state_dict = {name: read() for name, read in original_tensors(self._model).items()}
        else:
            _check_original(state_dict, hf.state_dict(), self._model.original_shapes)
        type(hf).save_pretrained(hf, save_directory, is_main_process, dict(state_dict), *arguments, **options)


def _check_original(
    given: Mapping[str, Tensor], patched: Mapping[str, Tensor], known: Collection[str]
) -> None:
    for name in given:
        if name in patched and name not in known:
            raise ConfigError(
                f"{name} is a name that patching gave: no checkpoint can be read back with it; leave "
                "state_dict out, and the weights are written under their original names"
            )
