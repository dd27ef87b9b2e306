"""Mean activations: what stands in for removed edges when there is no corrupted prompt at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.live_substitute import Call
from pahq_hf.capture.recording import answer_logits, capture
from pahq_hf.capture.substitutes import with_streams
from pahq_hf.circuit.ablation import BY_POSITION
from pahq_hf.errors import CircuitError
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task

Means = Mapping[str, NDArray[np.float32]]

CONTINUED = 4  # tokens after the prompts whose positions have means too
_CONTINUED_PROMPTS = 32  # how many prompts are continued
_LARGEST = 1 << 26  # numbers by position that a file holds


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

    return _by_writer(run, mean, axis=0)


def position_means(run: Activations, task: Task) -> dict[str, NDArray[np.float32]]:
    """What each writer writes at each position, on average over the prompts that have it.

    Positions are counted from a prompt's first real token (`capture.mean_per_position`).

    Args:
        run: A captured run.
        task: Says which tokens are real.

    Returns:
        `position.embedding` [pos, d_model], `position.z` [layer, pos, head, d_head], and `position.mlp`
        [layer, pos, d_model] where there are MLPs.
    """
    real = task.attention_mask.bool()
    where = task.position_ids[real]
    longest = int(where.max()) + 1

    def mean(values: Tensor) -> Tensor:
        tokens = values[real.to(values.device)].to("cpu", torch.float64)
        sums = tokens.new_zeros(longest, *tokens.shape[1:]).index_add_(0, where, tokens)
        counts = torch.bincount(where, minlength=longest)
        return (sums / counts.view(-1, *[1] * (tokens.ndim - 1))).to(torch.float32)

    found = _by_writer(run, mean, axis=0)
    return {BY_POSITION + name: values for name, values in found.items()}


def circuit_means(
    model: PatchedModel, task: Task, run: Activations, ids: Tensor, *, by_position: bool
) -> dict[str, NDArray[np.float32]]:
    """The means that are kept with a circuit: pooled over tokens, and by position.

    By position they go on for `CONTINUED` tokens beyond the longest prompts, which the model continues
    greedily for it: a circuit that generates finds means of what the model does there.

    Args:
        model: The patched model, at the precision that chooses the continuation.
        task: The prompts' layout.
        run: What stands for the prompts: a captured run, or per-position means laid out as one.
        ids: The prompts. [batch, pos]
        by_position: Whether means by position are wanted, too.

    Returns:
        `means_of`, with `position_means` if they are wanted and not too large.
    """
    pooled = means_of(run, task)
    if not by_position or sum(v.size for v in pooled.values()) * (task.length + CONTINUED) > _LARGEST:
        return pooled
    found = position_means(run, task)
    after = _after(model, task, ids)
    for name, values in after.items():
        axis = 0 if name.endswith("embedding") else 1
        found[name] = np.concatenate([found[name], values], axis=axis)
    return pooled | found


def has_positions(means: Means | None) -> bool:
    """Whether there are means by position."""
    return means is not None and f"{BY_POSITION}embedding" in means


def _by_writer(run: Activations, mean: Any, axis: int) -> dict[str, NDArray[np.float32]]:
    found = {"embedding": mean(run.embedding), "z": torch.stack([mean(z) for z in run.z], axis)}
    if run.mlp:
        found["mlp"] = torch.stack([mean(mlp) for mlp in run.mlp], axis)
    return {name: values.numpy() for name, values in found.items()}


def _after(model: PatchedModel, task: Task, ids: Tensor) -> dict[str, NDArray[np.float32]]:
    """Means by position of what the model writes while it continues the longest prompts."""
    longest = task.attention_mask.bool().all(-1).nonzero().flatten()[:_CONTINUED_PROMPTS]
    limit = getattr(model.hf.config, "max_position_embeddings", None)
    count = CONTINUED if limit is None else min(CONTINUED, limit - task.length)
    if count <= 0 or len(longest) == 0:
        return {}
    text = ids[longest].cpu()
    for _ in range(count):
        following = answer_logits(model, _bare(text), text).argmax(-1, keepdim=True)
        text = torch.cat([text, following.cpu()], dim=1)
    with model.precision.full_precision():
        run = capture(model, _bare(text), text)
    means = position_means(run, _bare(text))
    return {
        name: values[task.length :] if name.endswith("embedding") else values[:, task.length :]
        for name, values in means.items()
    }


def _bare(ids: Tensor) -> Task:
    """Prompts without padding and answers as a task that is scored at the last token."""
    rows, last = torch.arange(len(ids)), torch.full((len(ids),), ids.shape[1] - 1)
    nothing: tuple[tuple[int, ...], ...] = ((),) * len(ids)
    return Task("prompts", ids, ids, torch.ones_like(ids), rows, last, nothing, nothing)


class MeanActivations:
    """Mean activations in the place of what writers write, for any prompts.

    With means by position a token gets those of its position, counted from its prompt's first real token;
    what lies beyond the last position gets the last one's. Without, every token gets the same.

    Args:
        model: The patched model, at the precision of the streams the means add up to.
        means: From `means_of` or `circuit_means`.

    Raises:
        CircuitError: If they are of another model.
    """

    def __init__(self, model: PatchedModel, means: Means) -> None:
        self._device = model.device
        self._table = as_activations(model, means)  # one example, with a token for each position

    def of(self, call: Call) -> Activations:
        """The means of the positions of a forward pass."""
        table, last = self._table, self._table.embedding.shape[1] - 1
        if last == 0:
            return table  # one example of one token serves any
        where = call.positions(self._device).clamp_max(last)

        def pick(values: Tensor) -> Tensor:
            return values[0][where]

        return replace(
            table.map_writers(pick),
            attention_in=[pick(stream) for stream in table.attention_in],
            mlp_in=[pick(stream) for stream in table.mlp_in],
            final_in=pick(table.final_in),
        )


def zero_means(model: PatchedModel) -> dict[str, NDArray[np.float32]]:
    """Means of writers that write nothing: what zero ablation puts in the place of removed edges."""
    return {name: np.zeros(shape, np.float32) for name, shape in _shapes(model).items()}


def as_activations(model: PatchedModel, means: Means) -> Activations:
    """Mean activations in the shape of a run of one example.

    Args:
        model: The patched model.
        means: From `means_of` or `circuit_means`.

    Returns:
        Activations with the streams they add up to, with a token for each position; with one token, where
        there are no means by position.

    Raises:
        CircuitError: If they are of another model.
    """
    shapes = _shapes(model)
    found: dict[str, Any] = {name: np.asarray(values).shape for name, values in means.items()}
    wanted = dict(shapes)
    if has_positions(means):
        count = max(1, *found[f"{BY_POSITION}embedding"][:1])
        wanted |= {
            f"{BY_POSITION}{name}": (count, *shape) if name == "embedding" else (shape[0], count, *shape[1:])
            for name, shape in shapes.items()
        }
    if found != wanted:
        raise CircuitError(f"the stored means have shapes {found}; this model's would have {wanted}")

    def values_of(name: str) -> Tensor:
        """[pos, ...], or by layer [layer, pos, ...]"""
        stored = means.get(BY_POSITION + name)
        pooled = np.asarray(means[name])
        chosen = np.array(pooled[None] if name == "embedding" else pooled[:, None])
        values = torch.from_numpy(chosen if stored is None else np.array(stored))
        return values.to(model.device, model.hf.dtype)

    written = Activations(
        embedding=values_of("embedding")[None],
        z=[z[None] for z in values_of("z")],
        mlp=[mlp[None] for mlp in values_of("mlp")] if model.spec.mlps else [],
    )
    return with_streams(model, written)


def _shapes(model: PatchedModel) -> dict[str, tuple[int, ...]]:
    """Of means over all tokens."""
    spec, width = model.spec, model.embedding.embedding_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (width,),
        "z": (spec.layers, spec.heads, model.layers[0].attention.d_head),
    }
    return shapes | {"mlp": (spec.layers, width)} if spec.mlps else shapes
