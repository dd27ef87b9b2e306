"""`PAHQAttention`: the drop-in attention module, built from head-wise pieces.

The class is mixed into the Hugging Face attention class of the family, so `isinstance` checks,
`output_attentions` and configuration keep working; only the projections and the forward change. The
engines and the forward call the same pieces, so there is one source of numerics.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pahq_hf.architectures import Architecture, Rotate
from pahq_hf.errors import ConfigError
from pahq_hf.graph import ReaderKind
from pahq_hf.precision import PAHQLinear


class ReaderInputs(Protocol):
    """Normalised inputs of the individual readers of one attention layer."""

    def __call__(self, kind: ReaderKind) -> Tensor | None:
        """Inputs of all readers of a kind, or None when they all read the shared stream.

        Returns:
            [reader, batch, pos, d_model]
        """


class PAHQAttention(nn.Module):
    """Attention cut into heads. Use `patch_attention`, not the constructor.

    Attributes:
        n_heads: Query heads.
        n_groups: Key/value groups.
        d_head: Width of a head.
        q_proj: Query projection; head h owns rows `h*d_head : (h+1)*d_head`.
        k_proj: Key projection, by group.
        v_proj: Value projection, by group.
        o_proj: Output projection; head h owns columns `h*d_head : (h+1)*d_head`.
    """

    n_heads: int
    n_groups: int
    d_head: int
    scaling: float
    layer_idx: int
    q_proj: PAHQLinear
    k_proj: PAHQLinear
    v_proj: PAHQLinear
    o_proj: PAHQLinear
    rotate_fn: Rotate | None

    # -- head-wise pieces -------------------------------------------------------------------------

    def head_rows(self, head: int) -> slice:
        """Rows of `q_proj` (and columns of `o_proj`) that head owns; same for groups in k and v."""
        return slice(head * self.d_head, (head + 1) * self.d_head)

    def q(self, x: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Queries before rotation.

        Args:
            x: Normalised input. [batch, pos, d_model]
            heads: Which heads; all by default.

        Returns:
            [batch, head, pos, d_head]
        """
        return self._project(self.q_proj, x, heads)

    def k(self, x: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        """Keys before rotation. [batch, pos, d_model] -> [batch, group, pos, d_head]"""
        return self._project(self.k_proj, x, groups)

    def v(self, x: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        """Values. [batch, pos, d_model] -> [batch, group, pos, d_head]"""
        return self._project(self.v_proj, x, groups)

    def rotate(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """Apply the family's rotary embedding to queries or keys. [batch, head, pos, d_head]"""
        if self.rotate_fn is None or position_embeddings is None:
            return x
        cos, sin = position_embeddings
        # Hugging Face rotates q and k together; an empty k costs nothing.
        rotated, _ = self.rotate_fn(x, x[:, :0], cos, sin)
        return rotated

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Attention probabilities, softmax in FP32 or better.

        Args:
            q: Rotated queries. [batch, head, query, d_head]
            k: Rotated keys, one per head or shared by equal runs of heads. [batch, group, key, d_head]
            mask: Additive mask, broadcastable to [batch, head, query, key], or None.

        Returns:
            [batch, head, query, key]
        """
        scores = torch.matmul(q, self._per_head(k, q.shape[1]).transpose(-1, -2)) * self.scaling
        if mask is not None:
            scores = scores + mask
        dtype = torch.promote_types(scores.dtype, torch.float32)
        return torch.softmax(scores, dim=-1, dtype=dtype).to(q.dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What each head reads out: probabilities times values.

        Args:
            q: Rotated queries. [batch, head, query, d_head]
            k: Rotated keys. [batch, group, key, d_head]
            v: Values. [batch, group, key, d_head]
            mask: Additive mask or None.

        Returns:
            z. [batch, query, head, d_head]
        """
        return self._read_out(self.weights(q, k, mask), v)

    def out(self, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """What heads add to the residual stream.

        Args:
            z: Head outputs. [..., head, d_head]
            heads: Which heads `z` holds; None means all, and then the output bias is included. The
                bias belongs to no head.

        Returns:
            [..., d_model]
        """
        if heads is None:
            out: Tensor = self.o_proj(z.flatten(-2))
            return out
        return self.contributions(z, heads).sum(-2)

    def contributions(self, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """What each head adds, separately. [..., head, d_head] -> [..., head, d_model]"""
        heads = range(self.n_heads) if heads is None else heads
        weight = self.o_proj.dense().view(-1, self.n_heads, self.d_head)[:, list(heads)]
        return torch.einsum("...hd,ohd->...ho", z, weight)

    def stored_contribution(self, z: Tensor, head: int) -> Tensor:
        """What one head would add with the weight as it is stored. [..., 1, d_head] -> [..., d_model]"""
        return z.squeeze(-2) @ self.o_proj.base()[:, self.head_rows(head)].t()

    # -- the module -------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        reader_inputs: ReaderInputs | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Hugging Face's attention forward.

        Args:
            hidden_states: Normalised residual stream. [batch, pos, d_model]
            position_embeddings: Rotary tables (cos, sin).
            attention_mask: Additive mask. [batch, 1, query, key]
            past_key_values: A key/value cache.
            reader_inputs: Inputs that differ from head to head, put here by the engines' hooks.
            **kwargs: What else the family passes; unused.

        Returns:
            The attention output [batch, pos, d_model] and probabilities [batch, head, query, key].
        """
        q = self._read(self.q_proj, "q", hidden_states, reader_inputs)
        k = self._read(self.k_proj, "k", hidden_states, reader_inputs)
        v = self._read(self.v_proj, "v", hidden_states, reader_inputs)
        q, k = self.rotate(q, position_embeddings), self.rotate(k, position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        weights = self.weights(q, k, attention_mask)
        return self.out(self._read_out(weights, v)), weights

    # -- helpers ----------------------------------------------------------------------------------

    def _project(self, linear: PAHQLinear, x: Tensor, blocks: Sequence[int] | None) -> Tensor:
        if blocks is None:
            y = linear(x)
        else:
            y = torch.cat([linear.block(x, self.head_rows(block)) for block in blocks], dim=-1)
        return y.unflatten(-1, (-1, self.d_head)).transpose(-2, -3)

    def _read(
        self, linear: PAHQLinear, kind: ReaderKind, shared: Tensor, inputs: ReaderInputs | None
    ) -> Tensor:
        each = None if inputs is None else inputs(kind)
        if each is None:
            return self._project(linear, shared, None)
        # Readers of one weight block: one each, or several when groups are split per query head.
        return linear.blocks(each, self.d_head).transpose(0, 1)

    @staticmethod
    def _per_head(x: Tensor, heads: int) -> Tensor:
        """Repeat keys or values that several heads share. [batch, group, ...] -> [batch, head, ...]"""
        return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)

    def _read_out(self, weights: Tensor, v: Tensor) -> Tensor:
        z = torch.matmul(weights, self._per_head(v, weights.shape[1]))
        return z.transpose(1, 2)


def patch_attention(module: nn.Module, row: Architecture, n_heads: int, n_groups: int) -> PAHQAttention:
    """Turn a Hugging Face attention module into PAHQ attention, in place.

    Args:
        module: The family's attention module.
        row: Its row of the table.
        n_heads: Query heads.
        n_groups: Key/value groups.

    Returns:
        The same object, now a `PAHQAttention` too.

    Raises:
        ConfigError: If the module is patched already.
    """
    if isinstance(module, PAHQAttention):
        raise ConfigError("this model is patched already; wrap a freshly loaded one")
    q, k, v = _split_qkv(module, row, n_heads, n_groups)
    out = linear_from(getattr(module, row.out), row)
    for name in (*row.qkv, row.out):
        del module._modules[name]
    original = type(module)
    module.__class__ = type(f"PAHQ{original.__name__}", (PAHQAttention, original), {})
    assert isinstance(module, PAHQAttention)
    module.q_proj, module.k_proj, module.v_proj, module.o_proj = q, k, v, out
    module.n_heads, module.n_groups = n_heads, n_groups
    module.d_head = q.out_features // n_heads
    module.rotate_fn = row.rotate_of(original)
    if "_old_forward" in vars(module):  # accelerate's hooks call the forward they found: give them ours
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)
    return module


def _split_qkv(
    module: nn.Module, row: Architecture, n_heads: int, n_groups: int
) -> tuple[PAHQLinear, PAHQLinear, PAHQLinear]:
    if len(row.qkv) == 3:
        q, k, v = (linear_from(getattr(module, name), row) for name in row.qkv)
        return q, k, v
    weight, bias = _oriented(getattr(module, row.qkv[0]), row)
    d_head = weight.shape[0] // (n_heads + 2 * n_groups)
    sizes = [n_heads * d_head, n_groups * d_head, n_groups * d_head]
    weights = weight.split(sizes)
    biases = [None] * 3 if bias is None else bias.split(sizes)
    # A plain clone keeps Conv1D's strides; contiguous rows are what reading one head's weights needs.
    copies = (w.clone(memory_format=torch.contiguous_format) for w in weights)
    q, k, v = (PAHQLinear(w, b) for w, b in zip(copies, biases, strict=True))
    return q, k, v


def _oriented(module: nn.Module, row: Architecture) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return (weight.t() if row.conv1d else weight), bias


def linear_from(module: nn.Module, row: Architecture) -> PAHQLinear:
    """A `PAHQLinear` with the weights of a Linear or Conv1D."""
    weight, bias = _oriented(module, row)
    return PAHQLinear(weight.contiguous(), bias)
