"""Run a model as one of its circuits: forward, generate and pipelines see nothing but its edges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pahq_hf.capture import Activations, capture
from pahq_hf.engine.patched_run import PatchedRun
from pahq_hf.errors import ConfigError
from pahq_hf.graph import BoolArray
from pahq_hf.hooking import first_input, hooks
from pahq_hf.means import Means, as_activations
from pahq_hf.patch import PatchedModel
from pahq_hf.tasks.base import Task


@contextmanager
def applied(
    model: PatchedModel, kept: BoolArray, substitute: Activations, *, exact: bool = True
) -> Iterator[None]:
    """Inside, every forward pass of the Hugging Face model runs a circuit (semantics.md, section 2).

    Args:
        model: The patched model.
        kept: The circuit's edges. [readers, writers]
        substitute: What stands in for removed edges: a corrupted run of the same shape, or one example
            of one token that serves any.
        exact: Compute in FP32 whatever the weights are kept in.

    Raises:
        ConfigError: If a circuit is applied already.
    """
    if model.is_applied:
        raise ConfigError(
            "a circuit is applied already: leave that block first, or join both edge sets in one"
        )
    run = _AppliedRun(model, substitute, model.graph.all_edges & ~kept)
    with ExitStack() as stack:
        stack.enter_context(_marked(model))
        if exact:
            stack.enter_context(model.precision.full_precision())
            stack.enter_context(model.exact_tables())
        stack.enter_context(hooks(*run.register()))
        yield


@contextmanager
def _marked(model: PatchedModel) -> Iterator[None]:
    model.is_applied = True
    try:
        yield
    finally:
        model.is_applied = False


class _AppliedRun(PatchedRun):
    """A patched run whose buffer has the shape of whatever prompts come."""

    def __init__(self, model: PatchedModel, substitute: Activations, removed: BoolArray) -> None:
        super().__init__(model, substitute, removed, substitute.embedding)

    def _on_embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = first_input(args, kwargs)
        shape = self._substitute.embedding.shape
        if shape[:2] not in (stream.shape[:2], (1, 1)):
            raise ConfigError(
                f"the corrupted prompts have shape {tuple(shape[:2])}, this forward pass "
                f"{tuple(stream.shape[:2])}: give corrupted prompts of the same shape, or mean activations"
            )
        self._differences = stream.new_zeros(len(self._graph.writers), *stream.shape)
        super()._on_embedding(module, args, kwargs)


def substitute_of(
    model: PatchedModel, corrupted: Tensor | None, mask: Tensor | None, means: Means | None
) -> Activations:
    """What removed edges carry, in FP32: a run of corrupted prompts, or mean activations.

    Args:
        model: The patched model.
        corrupted: Token ids of corrupted prompts. [batch, pos]
        mask: Which of them are real. [batch, pos]
        means: Mean activations; corrupted prompts come before them.

    Returns:
        The activations.

    Raises:
        ConfigError: If a circuit is applied already, or there is neither.
    """
    if model.is_applied:
        raise ConfigError("a circuit is applied already: leave that block first")
    if corrupted is None and means is None:
        raise ConfigError(
            "this circuit comes without mean activations: give corrupted prompts (corrupted=ids) or means"
        )
    model.precision.deactivate()
    if corrupted is not None:
        return run_of_prompts(model, corrupted, mask)
    assert means is not None
    with model.precision.full_precision():
        return as_activations(model, means)


def run_of_prompts(model: PatchedModel, ids: Tensor, mask: Tensor | None) -> Activations:
    """What corrupted prompts write, in FP32.

    Args:
        model: The patched model.
        ids: Token ids. [batch, pos]
        mask: Which are real; all by default. [batch, pos]

    Returns:
        The captured run.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    last = mask.shape[1] - 1 - mask.flip(-1).argmax(-1)
    nothing: tuple[tuple[int, ...], ...] = ((),) * len(ids)
    task = Task(
        "apply", ids.cpu(), ids.cpu(), mask.cpu(), torch.arange(len(ids)), last.cpu(), nothing, nothing
    )
    with model.precision.full_precision():
        return capture(model, task, task.clean_ids)
