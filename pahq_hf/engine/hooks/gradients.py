"""Gradients of a metric with respect to what every reader reads, before its norm.

The Hugging Face model runs forwards once as it is. Gradients are taken where readers part ways: at each
layer's queries, keys and values, at the stream its MLP reads, and at the final stream. From the gradient of
a head's query follows that of what its reader reads, through the head's rows of the projection and the norm
before it; that is done later, for a few tokens at a time, so that no more is held of all readers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pahq_hf.capture.recording import forward_to_answers
from pahq_hf.circuit.graph import ReaderKind
from pahq_hf.engine.backward_rules import DERIVATIVE, BackwardRules
from pahq_hf.engine.session import Session
from pahq_hf.modeling.backward import frozen_norms, tempered, with_scaled_gradient
from pahq_hf.modeling.hooks import LayerHooks, first_input, hook_layer, hooks
from pahq_hf.modeling.layers import Layer
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import Metric

HEAD_KINDS: tuple[ReaderKind, ...] = ("v", "k", "q")


@dataclass(frozen=True)
class Shift:
    """What some writers of one layer write together on top of what they write.

    Attributes:
        layer: The layer.
        is_heads: Whether the writers are its heads; else its MLP.
        change: What they write more. [batch, pos, d_model]
    """

    layer: int
    is_heads: bool
    change: Tensor

    def after_heads(self, layer: Layer) -> Any:
        """Put a hook where what the heads write goes into the stream; the caller removes it."""
        attention = layer.attention
        door: nn.Module = attention if attention.output.norm is None else attention.output.norm
        more = self.change / attention.output.multiplier

        def add(_: nn.Module, __: Any, output: Any) -> Any:
            return (output[0] + more, *output[1:]) if isinstance(output, tuple) else output + more

        return door.register_forward_hook(add)


@dataclass
class ReaderGradients:
    """Gradients of one backward pass.

    Attributes:
        model: The patched model.
        session: Puts it into the precision that gradients run through.
        rules: Where the backward pass departs from the derivative.
        streams: Per layer, the stream its heads read. [batch, pos, d_model]
        heads: Per layer, gradients of queries, keys and values before norm and rotation, one entry for each
            reader. [batch, entry, pos, d_head]
        mlps: Per layer, of the stream the MLP reads; empty for attention-only models. [batch, pos, d_model]
        final: Of the stream `logits` reads. [batch, pos, d_model]
    """

    model: PatchedModel
    session: Session
    rules: BackwardRules = DERIVATIVE
    streams: list[Tensor] = field(default_factory=list)
    heads: list[dict[ReaderKind, Tensor]] = field(default_factory=list)
    mlps: list[Tensor] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.empty(0))

    def walk(self, tokens: Tensor) -> Iterator[tuple[range, Tensor]]:
        """Gradients reader by reader, from the output to the input.

        Args:
            tokens: Which tokens, as indices into the flattened batch.

        Yields:
            Consecutive readers, and the gradients of what they read. [reader, tokens, d_model]
        """
        model, graph = self.model, self.model.graph
        yield range(graph.logits_reader, graph.logits_reader + 1), self.final.flatten(0, 1)[tokens][None]
        for number in reversed(range(len(model.layers))):
            if self.mlps:
                yield graph.layer_readers(number, "mlp"), self.mlps[number].flatten(0, 1)[tokens][None]
            stream = self.streams[number].flatten(0, 1)[tokens]
            for kind in HEAD_KINDS:
                y = self.heads[number][kind].transpose(0, 1).flatten(1, 2)[:, tokens]
                with self.session(), _norms(model, self.rules):
                    gradients = _before_norm(model.layers[number], kind, stream, y)
                yield graph.layer_readers(number, kind), gradients


def _norms(model: PatchedModel, rules: BackwardRules) -> AbstractContextManager[None]:
    """Inside, norms follow the rules."""
    return frozen_norms(model) if rules.norms == "frozen" else nullcontext()


def _before_norm(layer: Layer, kind: ReaderKind, stream: Tensor, y: Tensor) -> Tensor:
    """From gradients of queries, keys or values to those of what their readers read.

    Args:
        layer: The layer.
        kind: `q`, `k` or `v`.
        stream: What the readers read. [tokens, d_model]
        y: Gradients of the projection's outputs. [entry, tokens, d_head]

    Returns:
        [entry, tokens, d_model]
    """
    attention = layer.attention
    linear = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}[kind]
    weight = linear.dense().view(-1, attention.d_head, linear.in_features)
    weight = weight.repeat_interleave(y.shape[0] // weight.shape[0], dim=0)  # where groups are split
    normed = torch.bmm(y, weight)
    if isinstance(layer.attention_norm, nn.Identity):
        return normed
    with torch.enable_grad():
        reads = stream.expand(normed.shape).clone().requires_grad_()
        # The norm's own forward, not its call, as everywhere: parallel blocks may have hooks on it.
        made = layer.attention_norm.forward(reads)
        (gradient,) = torch.autograd.grad(made, reads, normed)
    return gradient


def reader_gradients(
    model: PatchedModel,
    part: Task,
    metric: Metric,
    embedding: Tensor,
    session: Session,
    forward: AbstractContextManager[None],
    *,
    shift: Shift | None = None,
    rules: BackwardRules = DERIVATIVE,
) -> ReaderGradients:
    """Gradients of a metric on some examples.

    Args:
        model: The patched model.
        part: The examples.
        metric: The metric of these examples.
        embedding: What the `input` writer writes, in place of the prompts' own. [batch, pos, d_model]
        session: Puts the model into the precision that gradients run through.
        forward: The precision of the forward pass, and so of all activations.
        shift: What other writers write more.
        rules: Where the backward pass departs from the derivative.

    Returns:
        The gradients.
    """
    taps = _Taps(model, embedding, ReaderGradients(model, session, rules), shift)
    with session(), model.exact_embeddings(), torch.enable_grad(), _norms(model, rules):
        with forward, hooks(*taps.register()):
            logits = forward_to_answers(model, part, part.clean_ids)
        value = metric.followed(logits)
        gradients = iter(torch.autograd.grad(value, list(taps.all()), materialize_grads=True))
    return taps.filled(gradients)


class _Taps:
    """Hooks that note down the tensors where gradients are wanted, in one forward pass."""

    def __init__(
        self, model: PatchedModel, embedding: Tensor, found: ReaderGradients, shift: Shift | None
    ) -> None:
        self._model = model
        self._shift = shift
        self._embedding = embedding.detach().clone().requires_grad_()
        self._found = found

    def register(self) -> list[Any]:
        """Put all hooks in place; the caller removes them."""
        model = self._model
        first = model.layers[0].block.register_forward_pre_hook(self._on_embedding, with_kwargs=True)
        handles: list[Any] = [first]
        for number, layer in enumerate(model.layers):
            handles += hook_layer(layer, model.spec.mlps, self._hooks_of(number))
            handles += [gate.register_forward_hook(self._on_gate) for gate in layer.mlp.gates]
        if self._shift is not None and self._shift.is_heads:
            handles.append(self._shift.after_heads(model.layers[self._shift.layer]))
        handles.append(model.final_norm.register_forward_pre_hook(self._on_final))
        return handles

    def all(self) -> Iterator[Tensor]:
        """What was noted down, in a fixed order."""
        for kinds in self._found.heads:
            yield from (kinds[kind] for kind in HEAD_KINDS)
        yield from self._found.mlps
        yield self._found.final

    def filled(self, gradients: Iterator[Tensor]) -> ReaderGradients:
        """Gradients, in that order, in the place of what was noted down."""
        return ReaderGradients(
            self._model,
            self._found.session,
            self._found.rules,
            streams=self._found.streams,
            heads=[{kind: next(gradients) for kind in HEAD_KINDS} for _ in self._found.heads],
            mlps=[next(gradients) for _ in self._found.mlps],
            final=next(gradients),
        )

    def _on_embedding(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert first_input(args, kwargs).shape == self._embedding.shape
        if args:
            return (self._embedding, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._embedding}

    def _on_final(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._found.final = _own(args[0])
        return (self._found.final, *args[1:])

    def _on_gate(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return with_scaled_gradient(output, self._found.rules.gates)

    def _hooks_of(self, number: int) -> LayerHooks:
        found: dict[ReaderKind, Tensor] = {}
        shift, rules = self._shift, self._found.rules
        factors = {"q": rules.queries, "k": rules.keys, "v": rules.values}
        passed = {"normalised": tempered(rules.temperature)}

        def on_stream(stream: Tensor) -> None:
            self._found.streams.append(stream.detach())
            self._found.heads.append(found)

        def projected(kind: ReaderKind, y: Tensor) -> Tensor:
            readers = self._model.spec.heads if kind == "q" else self._model.spec.kv_readers
            found[kind] = _own(y) if readers == y.shape[1] else y.repeat_interleave(readers // y.shape[1], 1)
            return with_scaled_gradient(found[kind], factors[kind])

        def on_attention(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**kwargs, **passed, "projected": projected}

        def on_mlp_input(reads: Tensor) -> Tensor:
            self._found.mlps.append(_own(reads))
            return self._found.mlps[-1]

        def on_mlp(adds: Tensor) -> Tensor | None:
            if shift is None or shift.is_heads or shift.layer != number:
                return None
            return adds + shift.change

        return LayerHooks(
            on_stream=on_stream,
            on_attention=on_attention,
            on_heads=lambda written, z, o: None,
            on_mlp_input=on_mlp_input,
            on_mlp=on_mlp,
        )


def _own(values: Tensor) -> Tensor:
    """The same values as a tensor of their own, so that its gradient is that of one reader."""
    return values.view_as(values)
