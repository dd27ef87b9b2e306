"""`PAHQAttention`: the drop-in attention module, built from head-wise pieces.

The class is mixed into the Hugging Face attention class of the family, so `isinstance` checks,
`output_attentions` and configuration keep working; only the projections and the forward change. The
engines and the forward call the same pieces, so there is one source of numerics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pahq_hf.circuit.graph import ReaderKind
from pahq_hf.modeling.architectures.architecture import Architecture
from pahq_hf.modeling.architectures.position_embeddings import Tables
from pahq_hf.modeling.head_products import per_head, read_out, runs_of, times_output
from pahq_hf.modeling.norms import BlockOutput, norm_heads, norm_jointly
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.products import DeltaProduct, Product

Softmax = Callable[[Tensor], Tensor]  # over the last axis


def softmax(scores: Tensor) -> Tensor:
    """Probabilities over the last axis, in FP32 or better."""
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


class ReaderInputs(Protocol):
    """Normalised inputs of the individual readers of one attention layer."""

    def __call__(self, kind: ReaderKind) -> Tensor | None:
        """Inputs of all readers of a kind, or None when they all read the shared stream.

        Returns:
            [reader, batch, pos, d_model]
        """


class Projected(Protocol):
    """Sees what the projections give, and may replace it."""

    def __call__(self, kind: ReaderKind, y: Tensor) -> Tensor:
        """What goes on in its place.

        Args:
            kind: `q`, `k` or `v`.
            y: Before norm and rotation. [batch, entry, pos, d_head]

        Returns:
            As many entries, or one key or value for each query head. [batch, entry, pos, d_head]
        """


class PAHQAttention(nn.Module):
    """Attention cut into heads. Use `projections.patch_attention`, not the constructor.

    Attributes:
        n_heads: Query heads.
        n_groups: Key/value groups.
        d_head: Width of a head.
        q_proj: Query projection; head h owns rows `h*d_head : (h+1)*d_head`.
        k_proj: Key projection, by group.
        v_proj: Value projection, by group.
        o_proj: Output projection; head h owns columns `h*d_head : (h+1)*d_head`.
        row: The family's row of the table.
        family: The Hugging Face class this module had.
        output: What makes of the output projection's result what the block adds to the stream.
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
    row: Architecture
    family: type[nn.Module]
    output: BlockOutput
    softcap: float | None
    _norms: dict[str, nn.Module]  # of queries and keys

    # -- head-wise pieces -------------------------------------------------------------------------

    def head_rows(self, head: int) -> slice:
        """Rows of `q_proj` (and columns of `o_proj`) that head owns; same for groups in k and v."""
        return slice(head * self.d_head, (head + 1) * self.d_head)

    def q(self, x: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Queries before norm and rotation.

        Args:
            x: Normalised input. [batch, pos, d_model]
            heads: Which heads; all by default.

        Returns:
            [batch, head, pos, d_head]
        """
        return self._project(self.q_proj, x, heads)

    def k(self, x: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        """Keys before norm and rotation. [batch, pos, d_model] -> [batch, group, pos, d_head]"""
        return self._project(self.k_proj, x, groups)

    def v(self, x: Tensor, groups: Sequence[int] | None = None) -> Tensor:
        """Values before a bound. [batch, pos, d_model] -> [batch, group, pos, d_head]"""
        return self._project(self.v_proj, x, groups)

    def finish(
        self,
        kind: ReaderKind,
        y: Tensor,
        tables: Tables | None,
        blocks: Sequence[int] | None = None,
    ) -> Tensor:
        """Normalise, bound and rotate queries or keys; values are bounded at most.

        Args:
            kind: `q`, `k` or `v`.
            y: As `q`, `k`, `v` give it. [batch, entry, pos, d_head]
            tables: Of the rotary embedding, each [batch or 1, pos, width]; None leaves it out.
            blocks: Which head or group each entry is of; by default all, in order. Where a norm spans all
                heads, all are needed.

        Returns:
            The same shape.
        """
        return self.in_order(kind, y, blocks, 1, lambda part: self.rotate(kind, part, tables))

    def in_order(
        self,
        kind: ReaderKind,
        y: Tensor,
        blocks: Sequence[int] | None,
        axis: int,
        rotated: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The same with a rotation of the caller's, in the family's order. `axis` is that of the entries."""
        if self.row.norm_after_rotary:
            return self.normalise(kind, rotated(y), blocks, axis)
        y = self.normalise(kind, y, blocks, axis)
        bound = self.row.qkv_bound
        return rotated(y if bound is None else y.clamp(-bound, bound))

    def normalise(self, kind: ReaderKind, y: Tensor, blocks: Sequence[int] | None, axis: int) -> Tensor:
        """Apply the family's norm of queries or keys, if it has one. `axis` is that of the entries."""
        norm = self._norms.get(kind)
        if norm is None:
            return y
        if self.row.joint_qk_norm:
            return norm_jointly(norm, y, axis)
        if blocks is None:
            count = self.n_heads if kind == "q" else self.n_groups
            blocks = [entry * count // y.shape[axis] for entry in range(y.shape[axis])]
        return norm_heads(norm, y, blocks, axis)

    def rotate(self, kind: ReaderKind, y: Tensor, tables: Tables | None) -> Tensor:
        """Apply the family's rotary embedding to queries or keys. [batch, entry, pos, d_head]"""
        return y if kind == "v" or tables is None else self.row.rotary(self, y, tables, kind)

    def context(self, kwargs: dict[str, Any], length: int) -> tuple[Tensor | None, Tables | None]:
        """What attention takes from a forward pass without a cache, besides the stream.

        Args:
            kwargs: What the module is called with.
            length: Number of tokens.

        Returns:
            What is added to the scores [batch or 1, 1 or head, query, key], and rotary tables.
        """
        bias = self.row.score_bias(self, kwargs.get("attention_mask"), kwargs, (length, length))
        return bias, self.row.rotary.tables(self, kwargs)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None, normalised: Softmax = softmax) -> Tensor:
        """Attention probabilities, softmax in FP32 or better.

        Args:
            q: Finished queries. [batch, head, query, d_head]
            k: Finished keys, one per head or shared by equal runs of heads. [batch, group, key, d_head]
            bias: What is added to scores, broadcastable to [batch, head, query, key], or None.
            normalised: Makes probabilities of scores.

        Returns:
            [batch, head, query, key]
        """
        products = torch.matmul(q, per_head(k, q.shape[1]).transpose(-1, -2))
        return self.probabilities(products, bias, normalised)

    def probabilities(
        self,
        products: Tensor,
        bias: Tensor | None,
        normalised: Softmax = softmax,
        heads: Sequence[int] | None = None,
    ) -> Tensor:
        """Attention probabilities, softmax in FP32 or better.

        Args:
            products: Of finished queries and keys, q k^T. [..., query, key]
            bias: What is added to scores, broadcastable to that, or None.
            normalised: Makes probabilities of scores.
            heads: Which heads the entries of the first axis are of; None where all heads are the third
                axis from the end.

        Returns:
            [..., query, key]; they add up to less than one where a sink takes part.
        """
        scores = products * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if bias is not None:
            scores = scores + bias
        sinks = None if self.row.sinks is None else self.row.find(self, self.row.sinks)
        if sinks is None:
            return normalised(scores).to(products.dtype)
        if heads is None:
            own = sinks[:, None, None]
        else:
            own = sinks[list(heads)].view(-1, *[1] * (scores.ndim - 1))
        column = own.to(scores.dtype).expand(*scores.shape[:-1], 1)
        return normalised(torch.cat([scores, column], dim=-1))[..., :-1].to(products.dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """What each head reads out: probabilities times values.

        Args:
            q: Finished queries. [batch, head, query, d_head]
            k: Finished keys. [batch, group, key, d_head]
            v: Values. [batch, group, key, d_head]
            bias: What is added to scores, or None.

        Returns:
            z. [batch, query, head, d_head]
        """
        return read_out(self.weights(q, k, bias), v)

    def out(self, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """The output projection.

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
        return self.head_outputs(z, heads).sum(-2)

    def written(self, z: Tensor, o: Tensor | None = None) -> Tensor:
        """Heads as they enter the stream: z times the scale of what follows the output projection.

        Contributions are linear in it. Without a norm or a factor it is z itself.

        Args:
            z: What all heads read out. [..., head, d_head]
            o: The output projection of it, if known. [..., d_model]

        Returns:
            [..., head, d_head]
        """
        if self.output.is_plain:
            return z
        scale = self.output.scale(self.out(z) if o is None else o)
        return z * (scale[..., None] if isinstance(scale, Tensor) else scale)

    def added(self, written: Tensor) -> Tensor:
        """What the block adds to the stream. [..., head, d_head] -> [..., d_model]"""
        total = self.out(written)
        if self.o_proj.bias is not None and self.output.multiplier != 1.0:
            total = total + (self.output.multiplier - 1.0) * self.o_proj.bias
        return self.output.weighted(total)

    def contributions(self, written: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """What each head adds to the stream. [..., head, d_head] -> [..., head, d_model]"""
        return self.output.weighted(self.head_outputs(written, heads))

    def stored_contributions(self, written: Tensor, heads: Sequence[int]) -> Tensor:
        """The same with the weight as it is stored. [..., head, d_head] -> [..., head, d_model]"""
        # Heads next to each other lie in one block: no more is read, in full precision from the checkpoint.
        parts = [self.o_proj.base(self._columns(run)) for run in runs_of(heads)]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.output.weighted(times_output(written, range(len(heads)), weight))

    def _columns(self, heads: range) -> slice:
        """Columns of the output projection that belong to heads next to each other."""
        return slice(heads.start * self.d_head, heads.stop * self.d_head)

    def head_outputs(self, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """The output projection head by head, z W_O. [..., head, d_head] -> [..., head, d_model]"""
        return times_output(z, range(self.n_heads) if heads is None else heads, self.o_proj.dense())

    # -- packed for many products -------------------------------------------------------------------

    def packed_output(self, head: int) -> Product:
        """One head's part of the output projection, without the bias: z to z W_O."""
        return self.o_proj.piece(self.o_proj.whole.rows, self.head_rows(head))

    def packed_head_outputs(self, z: Tensor, heads: Sequence[int]) -> Tensor:
        """As `head_outputs`, heads first. [head, tokens, d_head] -> [head, tokens, d_model]"""
        return torch.stack([self.packed_output(head)(own) for head, own in zip(heads, z, strict=True)])

    def packed_output_difference(self, head: int) -> DeltaProduct:
        """The same for differences of z."""
        return self.o_proj.difference(self.o_proj.whole.rows, self.head_rows(head))

    # -- the module -------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        reader_inputs: ReaderInputs | None = None,
        projected: Projected | None = None,
        normalised: Softmax = softmax,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Hugging Face's attention forward.

        Args:
            hidden_states: Normalised residual stream. [batch, pos, d_model]
            residual: The stream, which BLOOM's attention adds itself.
            cache: A key/value cache.
            past_key_values: The same, as transformers before 5.24 calls it.
            layer_past: The same, as older families call it.
            reader_inputs: Inputs that differ from head to head, put here by the engines' hooks.
            projected: Sees queries, keys and values, put here by hooks that take gradients.
            normalised: Makes probabilities of scores, put here by the same.
            **kwargs: What else the family passes: the mask, rotary tables, positions.

        Returns:
            The attention output [batch, pos, d_model] and probabilities [batch, head, query, key].
        """
        q = self._read(self.q_proj, "q", hidden_states, reader_inputs)
        k = self._read(self.k_proj, "k", hidden_states, reader_inputs)
        v = self._read(self.v_proj, "v", hidden_states, reader_inputs)
        if projected is not None:
            q, k, v = projected("q", q), projected("k", k), projected("v", v)
        tables = self.row.rotary.tables(self, kwargs)
        q, k, v = self.finish("q", q, tables), self.finish("k", k, tables), self.finish("v", v, tables)
        past = next((given for given in (cache, past_key_values, layer_past) if given is not None), None)
        if past is not None:
            k, v = past.update(k, v, self.layer_idx)
        size = q.shape[-2], k.shape[-2]
        bias = self.row.score_bias(self, kwargs.get("attention_mask"), kwargs, size)
        weights = self.weights(q, k, bias, normalised)
        out = self.out(read_out(weights, v))
        if self.row.adds_residual and residual is not None:
            out = out + residual
        return out, weights

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
