"""Attention of one layer in batches: many circuits, several heads, only the tokens that matter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.circuit.graph import ReaderKind
from pahq_hf.engine.sparse.positions import TokenPlan, TokenSet
from pahq_hf.modeling.layers import Layer
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.products import DeltaProduct, Product, in_chunks


class HeadMath:
    """Head-wise computations of one attention layer over token lists.

    Leading axes: `n` heads or key/value readers, `K` circuits computed side by side.

    Args:
        layer: The layer.
        plan: The tokens.
        run: A captured run: its mask and rotary tables.
        number: Layer number.
        batch: Examples.
    """

    def __init__(self, layer: Layer, plan: TokenPlan, run: Activations, number: int, batch: int) -> None:
        self._norm = layer.attention_norm
        self.attention = layer.attention
        self._plan = plan
        self._rotary = run.rotary[number]
        mask = run.masks[number]
        # [batch, 1 or head, pos, pos]
        self._mask = None if mask is None else mask.expand(batch, -1, -1, -1)
        self._batch = batch

    def norm(self, x: Tensor) -> Tensor:
        """The norm before the heads. [..., d_model]"""
        y: Tensor = self._norm(x)
        return y

    def product(self, kind: ReaderKind, block: int) -> Product:
        """The projection of a weight block: head for q, group for k and v."""
        linear: PAHQLinear = getattr(self.attention, f"{kind}_proj")
        return linear.piece(self.attention.head_rows(block), linear.whole.cols)

    def difference(self, kind: ReaderKind, block: int) -> DeltaProduct:
        """The same for differences of its input."""
        linear: PAHQLinear = getattr(self.attention, f"{kind}_proj")
        return linear.difference(self.attention.head_rows(block), linear.whole.cols)

    def raw(self, kind: ReaderKind, blocks: Sequence[int], inputs: Sequence[Tensor]) -> Tensor:
        """Queries, keys or values before rotation, each from an input of its own.

        Args:
            kind: `q`, `k` or `v`.
            blocks: Weight block of each entry.
            inputs: Inputs before the layer's norm. Each [tokens, d_model]

        Returns:
            [n, tokens, d_head]
        """
        parts = []
        for block, x in zip(blocks, inputs, strict=True):
            product = self.product(kind, block)

            def projected(rows: Tensor, f: Product = product) -> Tensor:
                return f(self.norm(rows))

            parts.append(in_chunks(projected, x))
        return torch.stack(parts)

    def finished(self, kind: ReaderKind, blocks: Sequence[int], y: Tensor, tokens: TokenSet | None) -> Tensor:
        """Normalise, bound and rotate queries or keys; values are bounded at most.

        Args:
            kind: `q`, `k` or `v`.
            blocks: Weight block of each entry; all of them where a norm spans all heads.
            y: [n, tokens, d_head] or [n, K, tokens, d_head]
            tokens: Which tokens those are; None for the whole padded batch in order.

        Returns:
            The same shape.
        """

        def rotated(part: Tensor) -> Tensor:
            return self._rotated(kind, part, tokens)

        return self.attention.in_order(kind, y, blocks, 0, rotated)

    def _rotated(self, kind: ReaderKind, y: Tensor, tokens: TokenSet | None) -> Tensor:
        if kind == "v" or self._rotary is None:
            return y
        tables = []
        for table in self._rotary:  # [batch or 1, pos, width]
            full = table.expand(self._batch, -1, -1)
            tables.append(full.flatten(0, 1)[None] if tokens is None else tokens.pick(full)[None])
        # Entries stand in for the batch, circuits for the heads, tokens for the positions.
        grid = y if y.ndim == 4 else y[:, None]
        return self.attention.rotate(kind, grid, tuple(tables)).view(y.shape)

    @property
    def spans_heads(self) -> bool:
        """Whether a norm of queries or keys needs those of all heads."""
        return self.attention.row.joint_qk_norm

    def attend(self, q: Tensor, k: Tensor, heads: Sequence[int], tokens: TokenSet) -> Tensor:
        """Attention probabilities of queries at some tokens over all positions.

        Args:
            q: Finished queries. [n, K, tokens, d_head]
            k: Finished keys of each query's head; one for all circuits when its K is 1.
                [n, K or 1, batch, pos, d_head]
            heads: Which heads these are.
            tokens: The query tokens.

        Returns:
            [n, K, batch, width, pos]
        """
        grid = tokens.to_grid(q)  # [n, K, batch, width, d_head]
        bias = None if self._mask is None else self._bias(self._mask, heads, tokens)
        return self.attention.probabilities(_per_example(grid, k.transpose(-1, -2)), bias, heads=heads)

    def _bias(self, mask: Tensor, heads: Sequence[int], tokens: TokenSet) -> Tensor:
        """What is added to scores. [batch, width, pos] or [n, 1, batch, width, pos]"""
        if mask.shape[1] == 1:
            return tokens.to_grid(tokens.pick(mask[:, 0]))
        own = torch.stack([tokens.pick(mask[:, head]) for head in heads])
        return tokens.to_grid(own)[:, None]

    def read_out(self, probabilities: Tensor, v: Tensor, tokens: TokenSet) -> Tensor:
        """What is read out at the query tokens.

        Args:
            probabilities: [n, K, batch, width, pos]
            v: [n, K or 1, batch, pos, d_head]
            tokens: The query tokens.

        Returns:
            z. [n, K, tokens, d_head]
        """
        return tokens.from_grid(_per_example(probabilities, v))

    def with_window(self, base: Tensor, new: Tensor) -> Tensor:
        """Padded keys or values with new ones at the window's tokens.

        Args:
            base: Present ones. [n, batch, pos, d_head]
            new: New ones. [n, K, window tokens, d_head]

        Returns:
            [n, K, batch, pos, d_head]
        """
        window = self._plan.window
        full = base[:, None].expand(-1, new.shape[1], -1, -1, -1).clone()
        full[:, :, window.example, window.position] = new
        return full


def _per_example(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product per example and circuit.

    When `right` is the same for all circuits they are folded into its rows: one larger product instead
    of many small ones.

    Args:
        left: [n, K, batch, width, a]
        right: [n, K or 1, batch, a, b]

    Returns:
        [n, K, batch, width, b]
    """
    n, circuits, batch, width, inner = left.shape
    if right.shape[1] == circuits:
        return torch.matmul(left, right)
    folded = left.transpose(1, 2).reshape(n, batch, circuits * width, inner)
    product = torch.matmul(folded, right[:, 0])
    return product.unflatten(2, (circuits, width)).transpose(1, 2)
