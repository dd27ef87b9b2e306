"""Mean activations: what stands in for removed edges when there is no corrupted prompt at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture import Activations, with_streams
from pahq_hf.errors import CircuitError
from pahq_hf.patch import PatchedModel
from pahq_hf.substitute import Call
from pahq_hf.tasks.base import Task

Means = Mapping[str, NDArray[np.float32]]


def means_of(run: Activations, task: Task) -> dict[str, NDArray[np.float32]]:
    """What each writer writes on average over all real tokens of a run.

    Args:
        run: A captured run.
        task: Says which tokens are real.

    Returns:
        `embedding` [d_model], `z` [layer, head, d_head], and `mlp` [layer, d_model] where there are MLPs.
    """
    real = task.attention_mask.bool()

    def mean(values: Tensor) -> Tensor:
        return values[real.to(values.device)].to(torch.float64).mean(0).to("cpu", torch.float32)

    found = {"embedding": mean(run.embedding), "z": torch.stack([mean(z) for z in run.z])}
    if run.mlp:
        found["mlp"] = torch.stack([mean(mlp) for mlp in run.mlp])
    return {name: values.numpy() for name, values in found.items()}


class MeanActivations:
    """Mean activations in the place of what writers write, for any prompts.

    Args:
        model: The patched model.
        means: From `means_of`.

    Raises:
        CircuitError: If they are of another model.
    """

    def __init__(self, model: PatchedModel, means: Means) -> None:
        self._means = as_activations(model, means)

    def of(self, call: Call) -> Activations:
        """The same for every token of a forward pass: one example of one token."""
        return self._means


def as_activations(model: PatchedModel, means: Means) -> Activations:
    """Mean activations in the shape of a run that serves any batch: one example of one token.

    Args:
        model: The patched model.
        means: From `means_of`.

    Returns:
        Activations with the streams they add up to.

    Raises:
        CircuitError: If they are of another model.
    """
    spec, attention = model.spec, model.layers[0].attention
    width = model.embedding.embedding_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (width,),
        "z": (spec.layers, spec.heads, attention.d_head),
    }
    if spec.mlps:
        shapes["mlp"] = (spec.layers, width)
    found: dict[str, Any] = {name: np.asarray(values).shape for name, values in means.items()}
    if found != shapes:
        raise CircuitError(f"the stored means have shapes {found}; this model's would have {shapes}")

    def one(name: str) -> list[Tensor]:
        values = torch.from_numpy(np.array(means[name])).to(model.device, model.hf.dtype)
        return [row[None, None] for row in values]

    embedding = torch.from_numpy(np.array(means["embedding"])).to(model.device, model.hf.dtype)
    written = Activations(embedding=embedding[None, None], z=one("z"), mlp=one("mlp") if spec.mlps else [])
    return with_streams(model, written)
