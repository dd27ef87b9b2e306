"""Run the Hugging Face model once and keep what its writers wrote and its readers read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pahq_hf.errors import TaskError
from pahq_hf.patch import PatchedModel
from pahq_hf.tasks.base import Task

Hook = Callable[..., Any]


@dataclass
class Activations:
    """Everything one run wrote to the residual stream.

    Heads are kept as z, not as contributions: `d_model / d_head` times less memory.

    Attributes:
        embedding: What the `input` writer adds. [batch, pos, d_model]
        z: Per layer, what each head reads out. [batch, pos, head, d_head]
        mlp: Per layer, what the MLP adds; empty for attention-only models. [batch, pos, d_model]
        attention_in: Per layer, the stream the heads read. [batch, pos, d_model]
        mlp_in: Per layer, the stream the MLP reads. [batch, pos, d_model]
        final_in: The stream `logits` reads. [batch, pos, d_model]
        logits: Logits at the answer positions. [rows, vocab]
        masks: Per layer, the additive attention mask. [batch or 1, 1, query, key]
        rotary: Per layer, the rotary tables, or None.
    """

    embedding: Tensor = field(default_factory=lambda: torch.empty(0))
    z: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    attention_in: list[Tensor] = field(default_factory=list)
    mlp_in: list[Tensor] = field(default_factory=list)
    final_in: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    masks: list[Tensor | None] = field(default_factory=list)
    rotary: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    def map_writers(self, change: Callable[[Tensor], Tensor]) -> Activations:
        """A copy whose written activations (embedding, z, mlp) are changed one by one."""
        return replace(
            self,
            embedding=change(self.embedding),
            z=[change(z) for z in self.z],
            mlp=[change(mlp) for mlp in self.mlp],
        )


@contextmanager
def hooks(*registered: Any) -> Iterator[None]:
    """Remove hook handles on exit, also after an exception."""
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states a layer was called with, positional or by keyword."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def answer_logits(model: PatchedModel, task: Task, input_ids: Tensor) -> Tensor:
    """Run the Hugging Face model and return logits at the answer positions only.

    Args:
        model: The patched model.
        task: Gives mask, positions and rows.
        input_ids: Prompts. [batch, pos]

    Returns:
        [rows, vocab]
    """
    device = model.device
    rows, positions = task.answer_rows.to(device), task.answer_positions.to(device)

    def keep_rows(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][rows, positions].unsqueeze(0),)

    handle = model.unembedding.register_forward_pre_hook(keep_rows)
    with hooks(handle), torch.no_grad(), model.exact_tables():
        output = model.hf(
            input_ids=input_ids.to(device),
            attention_mask=task.attention_mask.to(device),
            position_ids=task.position_ids.to(device),
            use_cache=False,
        )
    logits: Tensor = output.logits[0]
    return logits


def capture(model: PatchedModel, task: Task, input_ids: Tensor) -> Activations:
    """Run prompts through the model and record its writers and readers.

    Args:
        model: The patched model, at whatever precision it has now.
        task: Gives mask, positions and rows.
        input_ids: Prompts. [batch, pos]

    Returns:
        The recorded activations.

    Raises:
        TaskError: If a token id is outside the vocabulary.
    """
    check_vocabulary(model, task)
    record = Activations()
    handles = []
    spec = model.spec

    def on_embedding(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.embedding = first_input(args, kwargs).clone()

    def on_attention(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.masks.append(kwargs.get("attention_mask"))
        record.rotary.append(kwargs.get("position_embeddings"))

    def on_z(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.z.append(args[0].unflatten(-1, (spec.heads, -1)).clone())

    def keep_in(store: list[Tensor]) -> Hook:
        return lambda _, args: store.append(args[0].clone())

    def on_mlp(_: nn.Module, __: Any, output: Tensor) -> None:
        record.mlp.append(output.clone())

    def on_final(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.final_in = args[0].clone()

    handles.append(model.layers[0].block.register_forward_pre_hook(on_embedding, with_kwargs=True))
    for layer in model.layers:
        handles.append(layer.attention_norm.register_forward_pre_hook(keep_in(record.attention_in)))
        handles.append(layer.attention.register_forward_pre_hook(on_attention, with_kwargs=True))
        handles.append(layer.attention.o_proj.register_forward_pre_hook(on_z))
        if spec.mlps:
            handles.append(layer.mlp_norm.register_forward_pre_hook(keep_in(record.mlp_in)))
            handles.append(layer.mlp.register_forward_hook(on_mlp))
    handles.append(model.final_norm.register_forward_pre_hook(on_final))
    with hooks(*handles):
        record.logits = answer_logits(model, task, input_ids)
    return record


def check_vocabulary(model: PatchedModel, task: Task) -> None:
    """Check that a task's token ids exist in the model, and that its prompts fit.

    Raises:
        TaskError: If one does not.
    """
    size = model.embedding.num_embeddings
    for name, ids in (("clean", task.clean_ids), ("corrupted", task.corrupted_ids)):
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise TaskError(f"a {name} prompt holds token id {int(ids.max())}; the model has {size} tokens")
    tokens = [token for row in (*task.answers, *task.distractors) for token in row]
    if tokens and not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
        raise TaskError(f"an answer has token id {max(tokens)}; the model has {model.vocab_size} tokens")
    limit = getattr(model.hf.config, "max_position_embeddings", None)
    if limit is not None and task.length > limit:
        raise TaskError(f"prompts have {task.length} tokens; the model takes at most {limit}")


def ablated(
    model: PatchedModel, clean: Activations, corrupted: Activations, task: Task, ablation: str
) -> Activations:
    """The activations that stand in for removed edges: `c_w` of semantics.md, section 2.

    Args:
        model: The patched model, for what written activations add up to.
        clean: The clean run.
        corrupted: The corrupted run.
        task: Gives the mask for means.
        ablation: `corrupted`, `zero`, `mean` (of the clean run, per position) or `mean-corrupted`.

    Returns:
        Activations whose embedding, z and mlp replace what writers write, and whose streams are what a
        reader without any kept edge reads.
    """
    if ablation == "corrupted":
        return corrupted
    if ablation == "zero":
        written = corrupted.map_writers(torch.zeros_like)
    else:
        base = clean if ablation == "mean" else corrupted
        written = base.map_writers(lambda values: mean_per_position(values, task))
    return with_streams(model, written)


def with_streams(model: PatchedModel, written: Activations) -> Activations:
    """The same written activations with the streams they add up to.

    Args:
        model: The patched model.
        written: Embedding, z and mlp.

    Returns:
        A copy whose `attention_in`, `mlp_in` and `final_in` are sums of contributions and output biases.
    """
    total = written.embedding
    attention_in, mlp_in = [], []
    for number, layer in enumerate(model.layers):
        before = total
        attention_in.append(before)
        attention = layer.attention
        with torch.no_grad():
            total = total + attention.contributions(written.z[number]).sum(-2)
        if attention.o_proj.bias is not None:
            total = total + attention.o_proj.bias
        if model.spec.mlps:
            mlp_in.append(before if model.spec.parallel else total)
            total = total + written.mlp[number]
        else:
            # An attention-only GPT-2 still adds its empty MLP's output bias, a constant.
            with torch.no_grad():
                total = total + layer.mlp(layer.mlp_norm(total))
    return replace(written, attention_in=attention_in, mlp_in=mlp_in, final_in=total)


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
    sums.index_add_(0, where, flat)
    counts = torch.bincount(where, minlength=task.length).clamp_min(1)
    means = (sums / counts[:, None]).to(values.dtype)
    return means[positions].view(values.shape)
