"""How attention learns of positions: tables that turn queries and keys, and what is added to scores."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pahq_hf.circuit.graph import ReaderKind

Tables = tuple[Tensor, ...]


class Rotary(Protocol):
    """Rotary position embedding of a family (RoPE, arXiv 2104.09864)."""

    def tables(self, attention: nn.Module, kwargs: dict[str, Any]) -> Tables | None:
        """The tables of a forward pass, from the arguments the attention is called with.

        Returns:
            Each [batch or 1, pos, width], or None without any.
        """

    def __call__(self, attention: nn.Module, x: Tensor, tables: Tables, kind: ReaderKind) -> Tensor:
        """Turn queries (`kind` is `q`) or keys (`k`). [batch, head, pos, d_head] -> the same"""


@dataclass(frozen=True)
class NoRotary:
    """Positions are learned, or biases."""

    def tables(self, attention: nn.Module, kwargs: dict[str, Any]) -> Tables | None:
        """None."""
        return None

    def __call__(self, attention: nn.Module, x: Tensor, tables: Tables, kind: ReaderKind) -> Tensor:
        """As it is."""
        return x


@dataclass(frozen=True)
class RotaryTables:
    """Tables (cos, sin) from the model, and the family's own `apply_rotary_pos_emb`.

    Tables narrower than a head turn its first features only (partial rotary).

    Attributes:
        turns: Whether an attention module does so, for families of which some layers know no positions.
        halves: Whether tables hold each angle once, and not for both features that it turns.
    """

    turns: Callable[[Any], bool] | None = None
    halves: bool = False

    def tables(self, attention: nn.Module, kwargs: dict[str, Any]) -> Tables | None:
        """What the model passes as `position_embeddings`."""
        if self.turns is not None and not self.turns(attention):
            return None
        return kwargs.get("position_embeddings")

    def __call__(self, attention: nn.Module, x: Tensor, tables: Tables, kind: ReaderKind) -> Tensor:
        """Turn queries or keys. [batch, head, pos, d_head]"""
        cos, sin = tables
        width = 2 * cos.shape[-1] if self.halves else cos.shape[-1]
        apply = _apply(attention)
        # Hugging Face rotates q and k together; an empty k costs nothing.
        turned: Tensor = apply(x[..., :width], x[:, :0, :, :width], cos, sin)[0]
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


@dataclass(frozen=True)
class ScaledQueries:
    """The same, and queries far from the first tokens are multiplied (Llama 4's, Ministral 3)."""

    def tables(self, attention: nn.Module, kwargs: dict[str, Any]) -> Tables | None:
        """(cos, sin) and the factors of the positions of the tokens."""
        cos, sin = kwargs["position_embeddings"]
        config: Any = attention.config
        rope = config.rope_parameters
        beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        scale = _module_of(attention)["get_llama_4_attn_scale"]
        factors: Tensor = scale(kwargs["position_ids"], beta, length)  # [batch, 1, pos, 1]
        return cos, sin, factors[:, 0].to(cos.dtype)

    def __call__(self, attention: nn.Module, x: Tensor, tables: Tables, kind: ReaderKind) -> Tensor:
        """Turn queries or keys. [batch, head, pos, d_head]"""
        *turning, factors = tables
        turned = ROTARY_TABLES(attention, x, tuple(turning), kind)
        return turned * factors[:, None] if kind == "q" else turned


@dataclass(frozen=True)
class GPTJRotary:
    """GPT-J's tables hold sines first, and it turns neighbouring features."""

    def tables(self, attention: nn.Module, kwargs: dict[str, Any]) -> Tables | None:
        """(sin, cos) at the positions of the tokens."""
        given: Tables | None = kwargs.get("position_embeddings")
        if given is not None:
            return given
        # Before transformers 5.24 each attention keeps them.
        positions, embedded = kwargs["position_ids"], attention.get_buffer("embed_positions")
        sin, cos = embedded.to(positions.device)[positions].chunk(2, dim=-1)
        return sin, cos

    def __call__(self, attention: nn.Module, x: Tensor, tables: Tables, kind: ReaderKind) -> Tensor:
        """Turn queries or keys. [batch, head, pos, d_head]"""
        sin, cos = (table.to(x.dtype) for table in tables)
        width = 2 * sin.shape[-1]
        turned: Tensor = _apply(attention)(x[..., :width].transpose(1, 2), sin, cos).transpose(1, 2)
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


NO_ROTARY: Rotary = NoRotary()
ROTARY_TABLES: Rotary = RotaryTables()
GPTJ_ROTARY: Rotary = GPTJRotary()
SCALED_QUERIES: Rotary = ScaledQueries()


def _module_of(attention: nn.Module) -> dict[str, Any]:
    """What is defined beside a family's attention class."""
    family = getattr(attention, "family", type(attention))
    return vars(sys.modules[family.__module__])


def _apply(attention: nn.Module) -> Any:
    """The `apply_rotary_pos_emb` that a family's attention class uses."""
    return _module_of(attention)["apply_rotary_pos_emb"]


def plain_bias(
    attention: nn.Module, mask: Tensor | None, kwargs: dict[str, Any], size: tuple[int, int]
) -> Tensor | None:
    """The mask as the model passes it.

    Args:
        attention: The attention module.
        mask: Additive mask. [batch or 1, 1 or head, query, key]
        kwargs: What else the attention is called with.
        size: Numbers of queries and keys.

    Returns:
        What is added to the scores. [batch or 1, 1 or head, query, key]
    """
    return mask


def alibi_bias(
    attention: nn.Module, mask: Tensor | None, kwargs: dict[str, Any], size: tuple[int, int]
) -> Tensor | None:
    """The mask and BLOOM's linear biases (ALiBi, arXiv 2108.12409), one slope for each head."""
    alibi: Tensor = kwargs["alibi"]  # [batch * head, 1, key]
    heads = int(attention.num_heads)  # type: ignore[arg-type]
    bias = alibi.view(-1, heads, 1, alibi.shape[-1])
    return bias if mask is None else bias + mask


def mpt_bias(
    attention: nn.Module, mask: Tensor | None, kwargs: dict[str, Any], size: tuple[int, int]
) -> Tensor | None:
    """MPT's linear biases, and its mask, which says what is hidden."""
    alibi: Tensor = kwargs["position_bias"]  # [head, 1, longest]
    bias = alibi[None, ..., -size[1] :]
    return bias if mask is None else torch.where(mask, torch.finfo(bias.dtype).min, bias)


def local_bias(
    attention: nn.Module, mask: Tensor | None, kwargs: dict[str, Any], size: tuple[int, int]
) -> Tensor | None:
    """The mask and GPT-Neo's own: causal, and in its local layers a window."""
    queries, keys = size
    allowed = attention.get_buffer("bias")[:, :, keys - queries : keys, :keys]
    dtype = torch.get_default_dtype() if mask is None else mask.dtype
    own = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    own.masked_fill_(~allowed, torch.finfo(dtype).min)
    return own if mask is None else own + mask
