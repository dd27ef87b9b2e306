"""What stands in for removed edges: the corrupted run, zeros or means, and the streams they add up to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.store import ActivationStore, MemoryStore, stored
from pahq_hf.modeling.layers import Layer
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.sums import add_rows
from pahq_hf.tasks.base import Task


def ablated(
    model: PatchedModel,
    clean: Activations,
    corrupted: Activations,
    task: Task,
    ablation: str,
    store: ActivationStore | None = None,
) -> Activations:
    """The activations that stand in for removed edges: `c_w` of docs/semantics.md, section 2.

    Args:
        model: The patched model, for what written activations add up to.
        clean: The clean run.
        corrupted: The corrupted run.
        task: Gives the mask for means.
        ablation: `corrupted`, `zero`, `mean` (of the clean run, per position) or `mean-corrupted`.
        store: Where new activations go; memory by default.

    Returns:
        Activations whose embedding, z and mlp replace what writers write, and whose streams are what a
        reader without any kept edge reads.
    """
    if ablation == "corrupted":
        return corrupted
    room = store or MemoryStore()
    if ablation == "zero":
        written = corrupted.map_writers(lambda values: room.empty(values.shape, values).zero_())
    else:
        base = clean if ablation == "mean" else corrupted
        written = base.map_writers(lambda values: stored(room, mean_per_position(values, task)))
    return with_streams(model, written, room)


def with_streams(
    model: PatchedModel, written: Activations, store: ActivationStore | None = None
) -> Activations:
    """The same written activations with the streams they add up to.

    Args:
        model: The patched model.
        written: Embedding, z and mlp.
        store: Where the streams go; memory by default.

    Returns:
        A copy whose `attention_in`, `mlp_in` and `final_in` are sums of what is written and output biases.
    """
    room = store or MemoryStore()
    total = written.embedding
    attention_in, mlp_in = [], []
    for number, layer in enumerate(model.layers):
        before = total
        attention_in.append(stored(room, before))
        with torch.no_grad():
            total = total + layer.attention.added(written.z[number])
        if model.spec.mlps:
            mlp_in.append(stored(room, before if model.spec.parallel else total))
            total = total + written.mlp[number]
        else:
            # An attention-only GPT-2 still adds its empty MLP's output bias, a constant.
            with torch.no_grad():
                total = total + layer.mlp(layer.mlp_norm(total))
    return replace(written, attention_in=attention_in, mlp_in=mlp_in, final_in=total)


def written_heads(layer: Layer, run: Activations, number: int) -> Tensor:
    """What a layer's heads read out of a recorded run, at the present precision.

    Args:
        layer: The layer.
        run: The run.
        number: Of the layer.

    Returns:
        As `Activations.z`. [batch, pos, head, d_head]
    """
    attention = layer.attention
    x = layer.attention_norm(run.attention_in[number])
    tables = run.rotary[number]
    q = attention.finish("q", attention.q(x), tables)
    k = attention.finish("k", attention.k(x), tables)
    v = attention.finish("v", attention.v(x), tables)
    return attention.written(attention.mix(q, k, v, run.masks[number]))


def mean_per_position(values: Tensor, task: Task) -> Tensor:
    """Mean over the examples that have a position, positions counted from the first real token.

    Args:
        values: [batch, pos, ...]
        task: Gives mask and positions.

    Returns:
        The mean, laid out as `values`; padding gets position 0's. [batch, pos, ...]
    """
    mask = task.attention_mask.to(values.device).bool()
    positions = task.position_ids.to(values.device)
    flat = values[mask].to(torch.float64).flatten(1)  # [tokens, features]
    where = positions[mask]
    sums = torch.zeros(task.length, flat.shape[1], dtype=torch.float64, device=values.device)
    add_rows(sums, where, flat)
    counts = torch.bincount(where, minlength=task.length).clamp_min(1)
    means = (sums / counts[:, None]).to(values.dtype)
    return means[positions].view(values.shape)
