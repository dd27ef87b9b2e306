"""A hash of a model's weights, the same in every precision regime."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from pahq_hf.precision import CheckpointSource
from pahq_hf.skeleton import stored_tensor

_ROWS = 4096  # of a weight that are hashed at once


def identity_of(
    model: PreTrainedModel, base_model: str, source: CheckpointSource | None = None
) -> dict[str, Any]:
    """What identifies a model, kept with every circuit that is found on it.

    Args:
        model: The model before it is patched or quantised.
        base_model: Its name.
        source: Where parameters are that have no memory yet.

    Returns:
        `base_model`, `revision`, `model_type`, `d_model`, `fingerprint`.
    """
    config = model.config
    return {
        "base_model": base_model,
        "revision": getattr(config, "_commit_hash", None),
        "model_type": config.model_type,
        "d_model": config.hidden_size,
        "fingerprint": fingerprint(model, source),
    }


def fingerprint(model: PreTrainedModel, source: CheckpointSource | None = None) -> str:
    """A short hash of a model's shape and every weight, the same in all precision regimes.

    Each row of each parameter enters as the sum of its FP32 bit patterns: exact whatever the order of
    summation, and as fast as memory.

    Args:
        model: The model before it is patched or quantised.
        source: Where parameters are that have no memory yet.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in model.named_parameters():
        digest.update(repr((name, tuple(parameter.shape))).encode())
        values = parameter.detach()
        if parameter.is_meta and source is not None:
            values = stored_tensor(source, model, name)
        for rows in values.split(_ROWS):
            bits = rows.to(torch.float32).contiguous().view(torch.int32)
            digest.update(bits.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
