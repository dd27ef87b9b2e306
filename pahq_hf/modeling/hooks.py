"""Forward hooks at the doors of decoder layers, wherever a family has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pahq_hf.modeling.layers import Layer

Hook = Callable[..., Any]


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


@dataclass(frozen=True)
class LayerHooks:
    """What to call at the doors of a layer while the Hugging Face model runs.

    Attributes:
        on_stream: Gets the stream that the heads read. [batch, pos, d_model]
        on_attention: Pre-hook of the attention, with keyword arguments.
        on_heads: Gets the heads as they enter the stream (`PAHQAttention.written`), z itself, and the
            output projection of it. [batch, pos, head, d_head] twice, [batch, pos, d_model]
        on_mlp_input: Gets the stream that the MLP reads and returns what it is to read, or None.
        on_mlp: Gets what the MLP adds and returns what it is to add, or None. [batch, pos, d_model]
    """

    on_stream: Callable[[Tensor], None]
    on_attention: Hook
    on_heads: Callable[[Tensor, Tensor, Tensor], None]
    on_mlp_input: Callable[[Tensor], Tensor | None]
    on_mlp: Callable[[Tensor], Tensor | None]


def hook_layer(layer: Layer, has_mlp: bool, on: LayerHooks) -> list[Any]:
    """Put hooks at the doors of a layer, wherever its family has them.

    Args:
        layer: The layer.
        has_mlp: Whether it has an MLP.
        on: What to call.

    Returns:
        Handles; the caller removes them.
    """
    attention, mlp = layer.attention, layer.mlp
    stream: list[Tensor] = []

    def at_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream[:] = [first_input(args, kwargs)]
        on.on_stream(stream[0])

    def at_heads(_: nn.Module, args: tuple[Tensor, ...], o: Tensor) -> None:
        z = args[0].unflatten(-1, (attention.n_heads, -1))
        on.on_heads(attention.written(z, o), z, o)

    def at_entry(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        given = args[0]
        # A shared norm ran for the attention: what the MLP reads before it is the layer's own input.
        reads = stream[0] if mlp.row.parallel else given.view(stream[0].shape)
        other = on.on_mlp_input(reads)
        if other is None:
            return None
        value = other if mlp.reads_stream else layer.mlp_norm.forward(other)
        return (value.view(given.shape), *args[1:])

    def at_exit(_: nn.Module, __: Any, given: Any) -> Any:
        output: Tensor = given[0] if isinstance(given, tuple) else given  # some tell what their router chose
        adds = output.view(stream[0].shape)
        factor = mlp.output.multiplier
        other = on.on_mlp(adds if factor == 1.0 else adds * factor)
        if other is None:
            return None
        value = (other / factor).view(output.shape)
        return (value, *given[1:]) if isinstance(given, tuple) else value

    handles = [
        layer.block.register_forward_pre_hook(at_block, with_kwargs=True),
        attention.register_forward_pre_hook(on.on_attention, with_kwargs=True),
        attention.o_proj.register_forward_hook(at_heads),
    ]
    if has_mlp:
        handles.append(mlp.entry.register_forward_pre_hook(at_entry))
        handles.append(mlp.exit.register_forward_hook(at_exit))
    return handles
