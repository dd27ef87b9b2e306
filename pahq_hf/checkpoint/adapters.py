"""LoRA adapters as PEFT saves them, merged into a model's weights: W + scale * B A.

PEFT itself is not needed: an adapter is two small matrices for each weight, in safetensors, and a config.
What is not of that kind (DoRA, prompts, pickles) is refused, and PEFT can merge it first.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from pahq_hf.checkpoint.fingerprint import identity_in
from pahq_hf.checkpoint.weight_files import HUB_ARGUMENTS, pick
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.json_reader import parse_json, read_regular
from pahq_hf.circuit.naming import shared_name
from pahq_hf.errors import ModelLoadError, first_line

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_LENIENT = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}
_ELSEWHERE = "let PEFT merge it (merge_and_unload), save the model, and give that"
_NOT_SUMS = ("use_dora", "use_qalora", "alora_invocation_tokens", "layer_replication", "target_parameters")
_CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_PART = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")
_WRAPPERS = re.compile(r"\.(modules_to_save|base_layer|original_module)(?=\.)")


@dataclass(frozen=True)
class Scaling:
    """What the products of an adapter's matrices are multiplied by.

    Attributes:
        alpha: The numerator.
        rank: The denominator, where no matrix tells it.
        alphas: Other numerators, by pattern of modules' names.
        ranks: Other denominators likewise.
        by_root: Whether it is the root of the rank that divides (rank-stabilised LoRA).
    """

    alpha: object
    rank: object
    alphas: Mapping[str, object] = field(default_factory=dict)
    ranks: Mapping[str, object] = field(default_factory=dict)
    by_root: bool = False

    def of(self, module: str, rank: int | None = None) -> float:
        """The factor for a module.

        Args:
            module: Its name.
            rank: The rank of its matrices, where it has two.

        Raises:
            ModelLoadError: If the config has no usable numbers.
        """
        alpha = _number("lora_alpha", _of_pattern(self.alphas, module, self.alpha))
        size = _number("r", _of_pattern(self.ranks, module, self.rank) if rank is None else rank)
        if size <= 0:
            raise ModelLoadError(f"the adapter's rank is {size}")
        return alpha / math.sqrt(size) if self.by_root else alpha / size


@dataclass(frozen=True)
class Adapter:
    """An adapter, read but for its weights.

    Attributes:
        name: The name by which it was found.
        base: Name of the model that it adapts.
        base_revision: Which commit, branch or tag of that.
        revision: The adapter's own commit on the Hub.
        weights: Its safetensors file.
        scaling: What its products are multiplied by.
    """

    name: str
    base: str
    base_revision: str | None
    revision: str | None
    weights: Path
    scaling: Scaling

    def identify(self, config: PretrainedConfig, fingerprint: str | None) -> ModelIdentity:
        """What identifies a model with this adapter: its base by name, and the adapter's name and revision.

        Args:
            config: The model's config.
            fingerprint: Of the merged weights.

        Returns:
            Both names, of a folder its last part.
        """
        own = shared_name(self.name)
        return replace(
            identity_in(config, self.base),
            fingerprint=fingerprint,
            adapter=own["base_model"],
            adapter_revision=self.revision or own.get("revision"),
        )


def find_adapter(name: str, arguments: Mapping[str, Any]) -> Adapter | None:
    """The adapter of a name, if it is one.

    Args:
        name: Folder or Hub id.
        arguments: As for `from_pretrained`.

    Returns:
        The adapter; None if there is none of that name.

    Raises:
        ModelLoadError: If it cannot be merged, or is damaged.
    """
    wanted = pick(arguments, *HUB_ARGUMENTS)
    path = _file(name, CONFIG_NAME, wanted)
    if path is None:
        return None
    config = _read_config(path)
    _check_mergeable(name, config)
    weights = _file(name, WEIGHTS_NAME, wanted)
    if weights is None:
        pickled = _file(name, _PICKLE_NAME, wanted) is not None
        why = "its weights are pickled: save it with safetensors" if pickled else f"it has no {WEIGHTS_NAME}"
        raise ModelLoadError(f"cannot read the adapter {name!r}: {why}")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelLoadError(f"the adapter {name!r} does not say which model it is of ({CONFIG_NAME})")
    commit = extract_commit_hash(str(path), None)
    of_base = revision if isinstance(revision, str) else None
    return Adapter(name, base, of_base, commit, weights, _scaling(config))


def is_local_adapter(name: str) -> bool:
    """Whether a name is of a folder with an adapter and no weights of a whole model."""
    folder = Path(name)
    return os.path.isfile(folder / CONFIG_NAME) and not any(folder.glob("model*.safetensors"))


def _scaling(config: Mapping[str, Any]) -> Scaling:
    alphas, ranks = (config.get(key) or {} for key in ("alpha_pattern", "rank_pattern"))
    if not isinstance(alphas, Mapping) or not isinstance(ranks, Mapping):
        raise ModelLoadError(f"{CONFIG_NAME}: alpha_pattern and rank_pattern are objects")
    return Scaling(config.get("lora_alpha"), config.get("r"), alphas, ranks, bool(config.get("use_rslora")))


def _file(name: str, file: str, wanted: dict[str, Any]) -> Path | None:
    try:
        found = cached_file(name, file, **wanted, **_LENIENT)
    except (OSError, ValueError):
        return None  # whoever loads the model says what is wrong with the name
    return None if found is None else Path(found)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = parse_json(read_regular(path))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object")
    return config


def _check_mergeable(name: str, config: Mapping[str, Any]) -> None:
    """Check that an adapter is a sum of two products and nothing else.

    Raises:
        ModelLoadError: If not.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelLoadError(f"the adapter {name!r} is of type {str(kind)[:40]}; only LORA is merged")
    for key in _NOT_SUMS:
        if config.get(key):
            raise ModelLoadError(f"the adapter {name!r} has {key}, which is not merged here: {_ELSEWHERE}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
        raise ModelLoadError(
            f"the adapter {name!r} was begun with {start[:40]}, which changes the model's own weights, too: "
            f"{_ELSEWHERE}"
        )


# -- merging ----------------------------------------------------------------------------------------


def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add an adapter to a model's weights, in place.

    Args:
        model: The model that it adapts, freshly loaded, in FP32 or FP64.
        adapter: The adapter.

    Raises:
        ModelLoadError: If it is damaged, or of another model.
    """
    try:
        tensors = load_file(adapter.weights)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"cannot read {adapter.weights}: {first_line(error)}") from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = _tied(model)
    changes = {**_sums(model, adapter, tensors), **_replacements(adapter, tensors)}
    if not changes:
        raise ModelLoadError(f"the adapter {adapter.name!r} has no weights")
    for name, (value, added) in changes.items():
        old = parameters.get(name)
        if old is None or old.shape != value.shape:
            raise ModelLoadError(
                f"the adapter {adapter.name!r} is of another model than {adapter.base!r}: its {name[:80]} is "
                f"{tuple(value.shape)}, the model's {None if old is None else tuple(old.shape)}"
            )
        if name in tied:
            raise ModelLoadError(
                f"the adapter {adapter.name!r} changes {name[:80]}, which the model ties to another weight: "
                f"{_ELSEWHERE}"
            )
        with torch.no_grad():
            value = value.to(old.device)
            old.copy_(old.double() + value if added else value)


def _sums(
    model: PreTrainedModel, adapter: Adapter, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, bool]]:
    """What is added to weights and biases, by name."""
    halves: dict[str, dict[str, Tensor]] = {}
    found: dict[str, tuple[Tensor, bool]] = {}
    for key, tensor in tensors.items():
        part = _PART.fullmatch(key)
        if part is not None:
            halves.setdefault(_module_name(part[1]), {})[part[2]] = tensor.double()
        elif key.endswith(".lora_B.bias"):
            module = _module_name(key.removesuffix(".lora_B.bias"))
            found[f"{module}.bias"] = (tensor.double() * adapter.scaling.of(module), True)
    modules = dict(model.named_modules())
    for name, half in halves.items():
        if half.keys() == {"lora_A", "lora_B"}:
            first, second = half["lora_A"], half["lora_B"]
        elif half.keys() == {"lora_embedding_A", "lora_embedding_B"}:
            first, second = half["lora_embedding_A"], half["lora_embedding_B"]
        else:
            raise ModelLoadError(f"{adapter.weights} has only {', '.join(sorted(half))} of {name[:80]}")
        if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
            raise ModelLoadError(f"{adapter.weights}: the matrices of {name[:80]} are no product of low rank")
        product = adapter.scaling.of(name, first.shape[0]) * (second @ first)
        turned = isinstance(modules.get(name), Conv1D | nn.Embedding)  # [in, out] and [tokens, width]
        found[f"{name}.weight"] = (product.T if turned else product, True)
    return found


def _number(name: str, value: object) -> float:
    """A number of a config.

    Raises:
        ModelLoadError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelLoadError(f"{CONFIG_NAME} has no usable {name}: {str(value)[:40]}")
    return float(value)


def _of_pattern(patterns: Mapping[str, object], module: str, otherwise: object) -> object:
    """The value of the first pattern that a module's name ends with, as PEFT chooses."""
    for pattern, value in patterns.items():
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
        except re.error as error:
            raise ModelLoadError(f"{CONFIG_NAME} has a pattern that is none: {str(pattern)[:40]}") from error
        if matches:
            return value
    return otherwise


def _replacements(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, bool]]:
    """Weights and biases that the adapter has whole (`modules_to_save`, `bias`), by name."""
    found: dict[str, tuple[Tensor, bool]] = {}
    for key, tensor in tensors.items():
        if _PART.fullmatch(key) or key.endswith(".lora_B.bias"):
            continue
        if "lora_" in key:
            raise ModelLoadError(
                f"{adapter.weights} has {key[:80]}, which is no part of a plain LoRA: {_ELSEWHERE}"
            )
        found[_WRAPPERS.sub("", _module_name(key))] = (tensor.double(), False)
    return found


def _module_name(key: str) -> str:
    """A name in the model, of one in an adapter's file."""
    return key.removeprefix("base_model.model.")


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of parameters that have another one, too."""
    seen: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.setdefault(id(parameter), []).append(name)
    return {name for names in seen.values() if len(names) > 1 for name in names}


# -- models that PEFT has changed -----------------------------------------------------------------------


def without_adapters(model: nn.Module) -> tuple[nn.Module, str | None]:
    """A model of PEFT, or one with `load_adapter`, as a plain one: a copy with its active adapters merged.

    Args:
        model: A model; any other than those two is given back as it is.

    Returns:
        The model, and the names of its adapters.

    Raises:
        ModelLoadError: If they cannot be merged.
    """
    whole, layers = _is_of(model, "peft."), [module for module in model.modules() if _is_layer(module)]
    if not whole and not layers:
        return model, None
    active = sorted({name for layer in layers for name in _active(layer)})
    if not active:
        raise ModelLoadError(
            "the adapter of this model is not active, or not in its weights; only LoRA is merged"
        )
    twin: Any = deepcopy(model)
    if whole:
        twin = twin.merge_and_unload(safe_merge=True)
    for name, layer in [(name, layer) for name, layer in twin.named_modules() if _is_layer(layer)]:
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, layer.get_base_layer())
    for parameter in twin.parameters():
        parameter.requires_grad_(True)  # PEFT froze them
    return twin, ", ".join(active)


def _is_of(value: object, package: str) -> bool:
    return any(kind.__module__.startswith(package) for kind in type(value).__mro__)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one that PEFT put around another, to add a product of low rank to its weight."""
    return _is_of(module, "peft.tuners.lora.layer")


def _active(layer: Any) -> Iterator[str]:
    return (name for name in layer.active_adapters if name in layer.r and not layer.disable_adapters)
