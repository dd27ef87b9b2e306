"""Run a model as one of its circuits: forward, generate and pipelines see nothing but its edges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.live_substitute import Call, Substitute, body_of
from pahq_hf.capture.mean_activations import MeanActivations, Means, zero_means
from pahq_hf.capture.partner import Partner, read_prompts
from pahq_hf.circuit.ablation import CORRUPTED, GIVEN, plain_ablation
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.hooks.patched_run import PatchedRun
from pahq_hf.errors import ConfigError, describe
from pahq_hf.modeling.hooks import first_input, hooks
from pahq_hf.modeling.patched_model import PatchedModel


@contextmanager
def applied(
    model: PatchedModel, kept: BoolArray, substitute: Substitute, *, exact: bool = True
) -> Iterator[None]:
    """Inside, every forward pass of the Hugging Face model runs a circuit (docs/semantics.md, section 2).

    Args:
        model: The patched model.
        kept: The circuit's edges. [readers, writers]
        substitute: What stands in for removed edges.
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
            stack.enter_context(model.exact_embeddings())
        stack.enter_context(run.in_place())
        yield


@contextmanager
def _marked(model: PatchedModel) -> Iterator[None]:
    model.is_applied = True
    try:
        yield
    finally:
        model.is_applied = False


class _AppliedRun(PatchedRun):
    """A patched run of whatever prompts come."""

    def __init__(self, model: PatchedModel, source: Substitute, removed: BoolArray) -> None:
        nothing = Activations()
        super().__init__(model, nothing, removed, nothing.embedding)
        self._source = source
        self._body = body_of(model.hf, model.layers[0].block, model.final_norm)
        self._handles: list[Any] = []
        self._is_called = False  # whether the substitute runs the body itself now

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's forward passes are this circuit's."""
        self._handles = self.register()
        with hooks(self._body.register_forward_pre_hook(self._on_body, with_kwargs=True)):
            try:
                yield
            finally:
                self._leave()

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_body(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._is_called:
            return None
        call = Call.of(body, args, kwargs, self._model.hf.config)
        self._is_called = True
        self._leave()
        try:
            self._substitute = self._source.of(call)
        finally:
            self._is_called = False
            self._handles = self.register()
        return (), call.arguments

    def _on_embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = first_input(args, kwargs)
        self._differences = stream.new_zeros(len(self._graph.writers), *stream.shape)
        super()._on_embedding(module, args, kwargs)


def plain_substitute(model: PatchedModel, found: str | None, means: Means | None) -> Substitute | None:
    """What stands in for removed edges without corrupted prompts, in FP32 (`ablation.plain_ablation`).

    Args:
        model: The patched model.
        found: The ablation the circuit was found under.
        means: The means kept with it.

    Returns:
        What gives it; None if there is nothing.

    Raises:
        CircuitError: If the means are of another model.
    """
    chosen = zero_means(model) if found == "zero" else means
    if chosen is None:
        return None
    with model.precision.full_precision():
        return MeanActivations(model, chosen)


def substitute_of(
    model: PatchedModel,
    circuit: Circuit,
    corrupted: Tensor | Mapping[str, Any] | None,
    mask: Tensor | None,
    means: Means | None,
) -> tuple[Substitute, str]:
    """What a circuit's removed edges carry, in FP32.

    Args:
        model: The patched model.
        circuit: The circuit.
        corrupted: Token ids of corrupted prompts, which run along, or what a tokenizer returns. [batch, pos]
        mask: Which of them are real. [batch, pos]
        means: Mean activations; without them and corrupted prompts, what is kept with the circuit.

    Returns:
        What gives it, and its name (`ablation.notice`).

    Raises:
        ConfigError: If a circuit is applied already, if there is nothing, both of the first are given, or one
            is something else.
        TaskError: If a token id is outside the vocabulary.
        CircuitError: If the means are of another model.
    """
    if model.is_applied:
        raise ConfigError("a circuit is applied already: leave that block first")
    if means is not None and not isinstance(means, Mapping):
        raise ConfigError(
            f"means are mean activations (pahq_hf.capture.mean_activations.means_of); got {describe(means)}"
        )
    if corrupted is not None and means is not None:
        raise ConfigError("give either corrupted prompts or mean activations, not both")
    if corrupted is not None:
        ids, mask = read_prompts(corrupted, mask)
        return Partner(model, ids, mask), CORRUPTED
    found = circuit.record.arguments.ablation if means is None else None
    carried = circuit.means if means is None else means
    substitute, name = plain_substitute(model, found, carried), plain_ablation(found, carried)
    if substitute is None or name is None:
        raise ConfigError(
            "this circuit comes without mean activations: give corrupted prompts (corrupted=ids) or means"
        )
    return substitute, name if means is None else GIVEN
