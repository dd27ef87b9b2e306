"""A hash of a model's weights, the same in every precision regime and dtype of the checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
import xxhash
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pahq_hf.checkpoint.streaming import stored_tensor
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.naming import shared_name
from pahq_hf.precision.fp32.source import CheckpointSource

_ROWS = 4096  # of a weight that are converted at once
_MARK = "xxh3-"


def identity_of(
    model: PreTrainedModel, base_model: str, source: CheckpointSource | None = None
) -> ModelIdentity:
    """What identifies a model, kept with every circuit that is found on it.

    Args:
        model: The model before it is patched or quantised.
        base_model: The name by which it was loaded.
        source: Where parameters are that have no memory yet.

    Returns:
        Name, revision, family, width and fingerprint.
    """
    return replace(identity_in(model.config, base_model), fingerprint=fingerprint(model, source))


def identity_in(config: PretrainedConfig, base_model: str) -> ModelIdentity:
    """What a config says of that, without weights.

    Args:
        config: The model's config.
        base_model: The name by which it was loaded.

    Returns:
        Name, revision, family and width.
    """
    return ModelIdentity.from_json(
        {
            "revision": getattr(config, "_commit_hash", None),
            **shared_name(base_model),
            "model_type": config.model_type,
            "d_model": config.hidden_size,
        }
    )


def fingerprint(model: PreTrainedModel, source: CheckpointSource | None = None) -> str:
    """A short hash of a model's family and every weight, the same in all precision regimes.

    A weight enters as XXH3 of its FP32 bit patterns, under its name: two swapped values are another model,
    a BF16 checkpoint and its FP32 copy are the same.

    Args:
        model: The model before it is patched or quantised.
        source: Where parameters are that have no memory yet.

    Returns:
        `xxh3-` and 32 hexadecimal digits.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach()
        if parameter.is_meta and source is not None:
            values = stored_tensor(source, model, name)
        digest.update(repr((name, tuple(parameter.shape))).encode())
        digest.update(hash_values(values))
    return _MARK + digest.hexdigest()[:32]


def hash_values(values: Tensor) -> bytes:
    """XXH3 of a tensor's FP32 bit patterns in order, whatever its dtype and where it is."""
    state = xxhash.xxh3_128()
    for rows in values.split(_ROWS) if values.ndim else [values]:
        state.update(rows.to("cpu", torch.float32).contiguous().numpy().data)
    return state.digest()
