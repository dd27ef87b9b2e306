"""A Hugging Face causal LM before it is patched: what can be asked of it, and what it cannot do alone."""

from __future__ import annotations

from itertools import chain
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pahq_hf.errors import ConfigError
from pahq_hf.modeling.architectures.lookup import find_architecture
from pahq_hf.modeling.architectures.refusals import check_is_not_quantised
from pahq_hf.modeling.attention import PAHQAttention
from pahq_hf.modeling.projections import linear_from


def check_supported(hf: PreTrainedModel, *, streamed: bool = False) -> None:
    """Check what can be checked of a model before anything runs.

    Args:
        hf: The model.
        streamed: Whether its projections are yet to be read from a checkpoint.

    Raises:
        UnsupportedModelError: If the family is unknown.
        ConfigError: If the model is patched already, not in float32 or float64, or partly offloaded.
    """
    find_architecture(hf.config, of=lambda: hf)
    check_is_not_quantised(hf.config, loading=streamed)
    if any(isinstance(module, PAHQAttention) for module in hf.modules()):
        raise ConfigError("this model is patched already; wrap a freshly loaded one")
    if hf.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"the model is in {hf.dtype}; circuit discovery keeps the residual stream in full precision: "
            "load it with dtype=torch.float32 (weights get smaller through PAHQConfig instead)"
        )
    if not streamed and any(parameter.is_meta for parameter in hf.parameters()):
        raise ConfigError(
            "some weights are offloaded to the CPU or to disk, out of reach of the projections' patches: "
            "load the model with a device_map that offloads nothing"
        )


def repair_empty_mlps(hf: PreTrainedModel) -> None:
    """Let an attention-only GPT-2 run: Hugging Face's `Conv1D` fails on a matrix without rows."""
    row = find_architecture(hf.config)
    if row.mlps:
        return
    for block in row.find(hf, row.layers):
        mlp = row.find(block, row.mlp)
        for name in row.mlp_linears:
            setattr(mlp, name, linear_from(getattr(mlp, name), row))


def resident_device(hf: PreTrainedModel) -> torch.device:
    """Where a model is, whatever part of it has no memory."""
    tensors = chain(hf.parameters(), hf.buffers())  # lazily: every forward asks
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def token_embedding(hf: PreTrainedModel) -> nn.Embedding:
    """The token embedding of a causal LM."""
    return cast(nn.Embedding, hf.get_input_embeddings())
