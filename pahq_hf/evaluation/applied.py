"""What a circuit answers inside `PAHQModel.apply`, measured as a user would see it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pahq_hf.capture.live_substitute import Substitute
from pahq_hf.capture.partner import Partner
from pahq_hf.capture.recording import answer_logits
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.hooks.apply import applied
from pahq_hf.engine.hooks.passes import BUFFER_BYTES
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task


def applied_logits(
    model: PatchedModel, kept: BoolArray, task: Task, substitute: Callable[[Task], Substitute]
) -> Tensor:
    """What a circuit answers to a task's clean prompts inside `apply`, in FP32.

    Args:
        model: The patched model.
        kept: The circuit's edges. [readers, writers]
        task: The prompts.
        substitute: Gives what stands in for removed edges, for some of them.

    Returns:
        Logits at the answer positions. [rows, vocab]
    """
    example = len(model.graph.writers) * task.length * model.embedding.embedding_dim * model.hf.dtype.itemsize
    size = max(1, BUFFER_BYTES // example)
    logits = torch.empty(0)
    for first in range(0, len(task), size):
        part, rows = task.part(first, min(first + size, len(task)))
        with applied(model, kept, substitute(part)):
            some = answer_logits(model, part, part.clean_ids)
        if first == 0:
            logits = some.new_empty(len(task.answers), some.shape[1])
        logits[rows.to(some.device)] = some
    return logits


def partner_of(model: PatchedModel, task: Task) -> Partner:
    """A task's corrupted prompts running along."""
    return Partner(model, task.corrupted_ids, task.attention_mask)
