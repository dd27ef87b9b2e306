"""Run the Hugging Face model once and keep what its writers wrote and its readers read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.store import ActivationStore, MemoryStore
from pahq_hf.errors import ConfigError, TaskError
from pahq_hf.modeling.architectures.position_embeddings import Tables
from pahq_hf.modeling.hooks import LayerHooks, first_input, hook_layer, hooks
from pahq_hf.modeling.layers import Layer
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.device_memory import until_it_fits
from pahq_hf.tasks.base import Task

_TOKENS = 4096  # that run at once while activations are captured


def answer_logits(model: PatchedModel, task: Task, input_ids: Tensor) -> Tensor:
    """Run the Hugging Face model and return logits at the answer positions only.

    Args:
        model: The patched model.
        task: Gives mask, positions and rows.
        input_ids: Prompts. [batch, pos]

    Returns:
        [rows, vocab]
    """
    return run_to_answers(model, task, input_ids)[1]


def run_to_answers(model: PatchedModel, task: Task, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same with what the logits are made of.

    Returns:
        Hidden states after the final norm [rows, d_model], and logits [rows, vocab].
    """
    with torch.no_grad():
        return followed_to_answers(model, task, input_ids)


def followed_to_answers(model: PatchedModel, task: Task, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `run_to_answers`, with gradients where they are enabled."""
    rows, positions = task.answer_rows.to(model.device), task.answer_positions.to(model.device)
    normed: list[Tensor] = []

    def keep_normed(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        normed.append(output[rows, positions])

    handle = model.final_norm.register_forward_hook(keep_normed)
    with model.exact_embeddings(), hooks(handle):
        logits = forward_to_answers(model, task, input_ids)
    return normed[0], logits


def exact_logits(model: PatchedModel, clean: Activations, x: Tensor) -> Tensor:
    """Logits of hidden states, as exact as those differ from a captured run's (`PatchedModel.logit_change`).

    Args:
        model: The patched model.
        clean: The run.
        x: Hidden states after the final norm. [..., rows, d_model]

    Returns:
        [..., rows, vocab] in float64
    """
    return clean.logits.to(torch.float64) + model.logit_change(x, clean.final_out)


def forward_to_answers(model: PatchedModel, task: Task, input_ids: Tensor) -> Tensor:
    """The same as `answer_logits`, with gradients where they are enabled, and tables as they are."""
    device = model.device
    rows, positions = task.answer_rows.to(device), task.answer_positions.to(device)

    def keep_rows(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][rows, positions].unsqueeze(0),)

    handle = model.unembedding.register_forward_pre_hook(keep_rows)
    with hooks(handle):
        output = model.hf(
            input_ids=input_ids.to(device),
            attention_mask=task.attention_mask.to(device),
            position_ids=task.position_ids.to(device),
            use_cache=False,
        )
    logits: Tensor = output.logits[0]
    return logits


def capture(
    model: PatchedModel, task: Task, input_ids: Tensor, store: ActivationStore | None = None
) -> Activations:
    """Run prompts through the model and record its writers and readers.

    Many examples run a few at a time, so that only what is recorded grows with their number.

    Args:
        model: The patched model, at whatever precision it has now.
        task: Gives mask, positions and rows.
        input_ids: Prompts. [batch, pos]
        store: Where activations go; memory by default.

    Returns:
        The recorded activations.

    Raises:
        TaskError: If a token id is outside the vocabulary.
        ConfigError: If a circuit is applied to the model.
        RunError: If the store has no room.
        OutOfMemoryError: If the device has none: for what is recorded, or for one example.
    """
    if model.is_applied:
        raise ConfigError("a circuit is applied to this model: leave that block first")
    check_vocabulary(model, task)
    recorder = _Recorder(len(task), store or MemoryStore())
    step = max(1, _TOKENS // task.length)

    def some(first: int) -> int:
        """Run as many examples as fit, and return how many."""
        part, rows = task.part(first, min(first + step, len(task)))
        with recorder.turned_to(first, len(part)), hooks(*_recording_hooks(model, recorder)):
            normed, logits = run_to_answers(model, part, input_ids[first : first + len(part)])
            recorder.put_rows("final_out", normed, rows.to(logits.device), len(task.answers))
            recorder.put_rows("logits", logits, rows.to(logits.device), len(task.answers))
        return len(part)

    def give_way() -> bool:
        nonlocal step
        more, step = step > 1, max(1, min(step, len(task)) // 2)
        return more

    first = 0
    what = f"what {len(task)} prompts of {task.length} tokens write and read in the model"
    while first < len(task):
        first += until_it_fits(partial(some, first), give_way, what, model.device)
    return recorder.run


@contextmanager
def recording(model: PatchedModel, examples: int) -> Iterator[Activations]:
    """Note down what one forward pass, with a cache or without, writes and reads.

    Args:
        model: The patched model.
        examples: Of the pass.

    Yields:
        Filled by the pass: all but logits, masks and rotary tables.
    """
    recorder = _Recorder(examples, MemoryStore())
    with recorder.turned_to(0, examples), hooks(*_recording_hooks(model, recorder, tables=False)):
        yield recorder.run


class _Recorder:
    """Puts what some examples wrote where it belongs among all examples."""

    def __init__(self, examples: int, store: ActivationStore) -> None:
        self.run = Activations()
        self._examples = examples
        self._store = store
        self._some = slice(0, 0)
        self._together: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._tables: list[Tensor] = []  # the different ones of the present examples

    @contextmanager
    def turned_to(self, first: int, count: int) -> Iterator[None]:
        """Inside, some examples are noted down; what fails inside can be tried again, with fewer."""
        self._some = slice(first, first + count)
        self._together.clear()
        self._tables.clear()
        masks, rotary = [*self.run.masks], [*self.run.rotary]
        try:
            yield
        except BaseException:
            self.run.masks, self.run.rotary = masks, rotary  # what grows from run to run
            self._together.clear()
            self._tables.clear()
            raise

    def put(self, kind: str, values: Tensor, layer: int | None = None) -> None:
        """Note down an activation. [some of the batch, ...]"""
        if layer is None:
            room = getattr(self.run, kind)
            if self._some.start == 0:
                room = self._room(values)
                setattr(self.run, kind, room)
        else:
            stored = getattr(self.run, kind)
            if len(stored) == layer:
                stored.append(self._room(values))
            room = stored[layer]
        room[self._some] = values

    def _room(self, values: Tensor) -> Tensor:
        return self._store.empty((self._examples, *values.shape[1:]), values)

    def put_shared(self, layer: int, bias: Tensor | None, tables: Tables | None) -> None:
        """Note down a layer's score bias and rotary tables; layers that share them go on doing so."""
        if self._some.start == 0:
            self.run.masks.append(None if bias is None else self._share(bias))
            self.run.rotary.append(None if tables is None else tuple(map(self._share, tables)))
            return
        before, tables_before = self.run.masks[layer], self.run.rotary[layer]
        if before is not None and bias is not None:
            self.run.masks[layer] = self._joined(before, self._share(bias))
        if tables_before is not None and tables is not None:
            pairs = zip(tables_before, map(self._share, tables), strict=True)
            self.run.rotary[layer] = tuple(self._joined(old, new) for old, new in pairs)

    def _share(self, table: Tensor) -> Tensor:
        """The table of an earlier layer that is the same: families make some of them anew in each."""
        for other in self._tables:
            if other is table or (other.shape == table.shape and torch.equal(other, table)):
                return other
        self._tables.append(table)
        return table

    def _joined(self, before: Tensor, more: Tensor) -> Tensor:
        """One table for all examples so far; a table that serves any example may have a batch size of one."""
        key = id(before), id(more)
        if key not in self._together:
            shape, count = before.shape[1:], self._some.stop - self._some.start
            joined = torch.cat([before.expand(self._some.start, *shape), more.expand(count, *shape)])
            self._together[key] = before, more, joined  # alive, so that no other tensor gets its id
        return self._together[key][2]

    def put_rows(self, kind: str, values: Tensor, rows: Tensor, count: int) -> None:
        """Note down what there is at the answers only. [rows of the examples, ...]"""
        if self._some.start == 0:
            setattr(self.run, kind, values.new_empty(count, values.shape[1]))
        getattr(self.run, kind)[rows] = values


def _recording_hooks(model: PatchedModel, recorder: _Recorder, *, tables: bool = True) -> list[Any]:
    def on_embedding(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.put("embedding", first_input(args, kwargs))

    def on_final(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        recorder.put("final_in", args[0])

    def of_layer(number: int, layer: Layer) -> LayerHooks:
        def on_attention(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if tables:
                bias, rotary = layer.attention.context(kwargs, first_input(args, kwargs).shape[1])
                recorder.put_shared(number, bias, rotary)

        return LayerHooks(
            on_stream=lambda stream: recorder.put("attention_in", stream, number),
            on_attention=on_attention,
            on_heads=lambda written, z, o: recorder.put("z", written, number),
            on_mlp_input=lambda stream: recorder.put("mlp_in", stream, number),
            on_mlp=lambda adds: recorder.put("mlp", adds, number),
        )

    handles = [model.layers[0].block.register_forward_pre_hook(on_embedding, with_kwargs=True)]
    for number, layer in enumerate(model.layers):
        handles += hook_layer(layer, model.spec.mlps, of_layer(number, layer))
    handles.append(model.final_norm.register_forward_pre_hook(on_final))
    return handles


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
    config = model.hf.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if limit is not None and task.length > limit:
        raise TaskError(f"prompts have {task.length} tokens; the model takes at most {limit}")
