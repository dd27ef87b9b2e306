"""Checks at load: the patched model must be the Hugging Face model, cut without loss."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import capture
from pahq_hf.capture.substitutes import with_streams, written_heads
from pahq_hf.checkpoint.streaming import borrowed
from pahq_hf.errors import SelfCheckError, first_line
from pahq_hf.modeling.architectures.lookup import find_architecture
from pahq_hf.modeling.layers import Layer
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.modeling.untouched import resident_device, token_embedding
from pahq_hf.precision.fp32.source import CheckpointSource
from pahq_hf.tasks.base import Task

_TOLERANCE = 1e-5
_LENGTH = 8
_PADDING = 3
# What products of wrong shapes, and modules called in a wrong way, raise.
_WRONG_ROW = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


def probe_task(hf: PreTrainedModel) -> Task:
    """A short random input: two sequences, one of them padded.

    The padding is on the left, where it shifts positions and masks whole rows, except in float64: there
    the untouched families whose softmax is float32 turn such a row's mask into infinities, and NaN.
    """
    vocab = token_embedding(hf).num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (2, _LENGTH), generator=generator)
    left = hf.dtype != torch.float64
    mask = torch.ones_like(ids)
    mask[1, slice(0, _PADDING) if left else slice(_LENGTH - _PADDING, _LENGTH)] = 0
    rows = torch.arange(2).repeat_interleave(2)
    positions = torch.tensor([_LENGTH - 3, _LENGTH - 1] * 2)
    positions[2:] -= 0 if left else _PADDING
    nothing: tuple[tuple[int, ...], ...] = ((),) * 4
    return Task("self-check", ids, ids, mask, rows, positions, nothing, nothing)


def reference_logits(hf: PreTrainedModel, task: Task) -> Tensor:
    """Logits of a model nobody has touched yet, at the task's answer positions. [rows, vocab]"""
    device = resident_device(hf)
    with torch.no_grad():
        output = hf(
            input_ids=task.clean_ids.to(device),
            attention_mask=task.attention_mask.to(device),
            position_ids=task.position_ids.to(device),
            use_cache=False,
        )
    logits: Tensor = output.logits
    return logits[task.answer_rows.to(logits.device), task.answer_positions.to(logits.device)].clone()


def untouched_logits(model: PreTrainedModel, probe: Task, origin: CheckpointSource | None) -> Tensor:
    """Logits of the untouched model, which afterwards has eager attention: that shows its masks.

    Args:
        model: The model.
        probe: The probe.
        origin: Where weights are that have no memory yet.

    Returns:
        [rows, vocab]
    """
    _use_attention(model, find_architecture(model.config).reference)
    if model.dtype == torch.float64 and hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    if origin is None:
        logits = reference_logits(model, probe)
    else:
        with borrowed(model, origin, resident_device(model)):
            logits = reference_logits(model, probe)
    _use_attention(model, "eager")
    return logits


def _use_attention(model: PreTrainedModel, name: str) -> None:
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:  # older families look it up, but cannot be told
        model.config._attn_implementation = name


def check_patched(model: PatchedModel, task: Task, reference: Tensor) -> None:
    """Compare the patched model with the untouched forward, and contributions with the stream.

    Args:
        model: The patched model in full precision.
        task: The probe.
        reference: The untouched model's logits on it. [rows, vocab]

    Raises:
        SelfCheckError: If they differ, naming what differs and by how much.
    """
    try:
        _check(model, task, reference)
    except _WRONG_ROW as error:
        raise SelfCheckError(
            f"self-check failed: cut as the row of family {model.arch.model_type} says, the model does "
            f"not run: {first_line(error)}"
        ) from error


def _check(model: PatchedModel, task: Task, reference: Tensor) -> None:
    run = capture(model, task, task.clean_ids)
    if not torch.isfinite(reference).all():
        raise SelfCheckError(
            "the model's logits hold NaN or infinity on a random prompt; check the checkpoint"
        )
    _compare("logits of the patched model and the Hugging Face forward", run.logits, reference)
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            _check_layer(layer, number, run, has_mlp=model.spec.mlps)
    _check_streams(model, run)
    with torch.no_grad(), model.exact_embeddings():
        rows, positions = task.answer_rows.to(model.device), task.answer_positions.to(model.device)
        logits = model.logits(model.final_norm(run.final_in[rows, positions]))
    _compare("logits computed from the last stream and the Hugging Face forward", logits, reference)


def _check_layer(layer: Layer, number: int, run: Activations, *, has_mlp: bool) -> None:
    """Compare what the engines compute of a layer with what the forward pass made."""
    attention, written = layer.attention, run.z[number]
    together = attention.contributions(written).sum(-2)
    if attention.o_proj.bias is not None:
        together = together + attention.output.multiplier * attention.o_proj.bias
    what = f"the sum of what the heads of layer {number} add and its attention output"
    _compare(what, together, attention.added(written))
    heads = written_heads(layer, run, number)
    _compare(f"the heads of layer {number} by themselves and in the forward pass", heads, written)
    if has_mlp:
        ours = layer.mlp(layer.mlp_norm(run.mlp_in[number]))
        _compare(f"the MLP of layer {number} by itself and in the forward pass", ours, run.mlp[number])


def _check_streams(model: PatchedModel, run: Activations) -> None:
    added = with_streams(model, run)
    what = "the sum of what writers add and the residual stream that"
    for number, (ours, theirs) in enumerate(zip(added.attention_in, run.attention_in, strict=True)):
        _compare(f"{what} the attention of layer {number} reads", ours, theirs)
    for number, (ours, theirs) in enumerate(zip(added.mlp_in, run.mlp_in, strict=True)):
        _compare(f"{what} the MLP of layer {number} reads", ours, theirs)
    _compare(f"{what} logits reads", added.final_in, run.final_in)


def _compare(what: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise SelfCheckError(
            f"self-check failed: {what} have shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
        )
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    if not error <= _TOLERANCE:
        raise SelfCheckError(
            f"self-check failed: {what} differ by {error:.1e} (relative; allowed {_TOLERANCE:.0e})"
        )
