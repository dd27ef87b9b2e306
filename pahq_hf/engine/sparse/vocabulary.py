"""Sums over the vocabulary, in blocks that stay in cache; logits are never stored.

Their gradients come from a second pass over the blocks, for which a few streams' logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pahq_hf.precision.backward import is_differentiated
from pahq_hf.precision.embeddings import EmbeddingMatrix, exact_block
from pahq_hf.precision.products import Product

BLOCK = 2048  # tokens of the vocabulary, and
_ROWS = 512  # rows, that are scored at once: measured
_HELD = 1 << 24  # logits at once that are kept for a gradient
SMALLEST = 128  # tokens, where memory runs out


class Blocks:
    """The unembedding in blocks that are packed for products.

    Args:
        unembedding: The unembedding, W_U [vocab, d_model].
        bias: What products add. [vocab]
        copies: Packed copies that may be kept: one for products, a second for gradients. What is not kept is
            packed block by block whenever it is wanted.
        block: Tokens of a block.
    """

    def __init__(
        self,
        unembedding: nn.Linear | EmbeddingMatrix,
        bias: Tensor | None,
        *,
        copies: int = 2,
        block: int = BLOCK,
    ) -> None:
        self._unembedding = unembedding
        self._bias = bias
        self._copies = copies
        self._block = block
        self._held: list[Product] = []
        self._turned: list[Product] = []

    @property
    def vocab(self) -> int:
        """Tokens."""
        return self._unembedding.out_features

    def __len__(self) -> int:
        return -(-self.vocab // self._block)

    def __iter__(self) -> Iterator[Product]:
        """The blocks, in order."""
        if self._copies < 1:
            return self._packed()
        self._held = self._held or list(self._packed())
        return iter(self._held)

    def logits(self, x: Tensor) -> Tensor:
        """Scores of all tokens. [n, d_model] -> [n, vocab]"""
        return torch.cat([product(x) for product in self], dim=-1)

    def turned(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """For each block what sums its rows, so much of each. Each [n, tokens] -> [n, d_model]"""
        weights = (exact_block(self._unembedding, rows) for rows in self._rows())
        if self._copies < 2:
            return (partial(_sum_of_rows, weight) for weight in weights)
        self._turned = self._turned or [Product(weight.T) for weight in weights]
        return iter(self._turned)

    def _packed(self) -> Iterator[Product]:
        for rows in self._rows():
            bias = None if self._bias is None else self._bias[rows]
            yield Product(exact_block(self._unembedding, rows), bias)

    def _rows(self) -> Iterator[slice]:
        size = self._block
        return (slice(start, min(start + size, self.vocab)) for start in range(0, self.vocab, size))


class Vocabulary:
    """`logsumexp(x W_U^T + b)` in FP32.

    Args:
        unembedding: The unembedding, W_U [vocab, d_model].
        bias: Its bias. [vocab]
        shift: A value near each row's result, which keeps exponentials in range. [rows]
        copies: Of the packed unembedding, as for `Blocks`.
        block: Tokens at once.
    """

    def __init__(
        self,
        unembedding: nn.Linear | EmbeddingMatrix,
        bias: Tensor | None,
        shift: Tensor,
        *,
        copies: int = 2,
        block: int = BLOCK,
    ) -> None:
        self._blocks = Blocks(unembedding, bias, copies=copies, block=block)
        self._shift = shift

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, rows, d_model] -> [batch, rows] in float64"""
        return over_vocabulary(self, x)

    def values(self, x: Tensor) -> Tensor:
        """The same, of streams without gradients."""
        return in_batches(self._few, x)

    def followed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and gradients: the unembedding's mean under each row's softmax.

        Args:
            x: [batch, rows, d_model]

        Returns:
            [batch, rows] in float64, and [batch, rows, d_model]
        """
        return followed_in_batches(self._few_followed, x, self._blocks.vocab)

    def _few_followed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        held: list[Tensor] = []
        values, total = self._few(x, held), torch.zeros_like(x.flatten(0, 1))
        level = values.flatten().to(x.dtype)[:, None]
        for logits, rows in zip(held, self._blocks.turned(), strict=True):
            total += rows(logits.sub_(level).exp_())
        return values, total.view(x.shape)

    def _few(self, x: Tensor, held: list[Tensor] | None = None) -> Tensor:
        """`logsumexp` of a few streams; their logits are left in `held`, by blocks."""
        batch, rows, _ = x.shape
        flat = x.reshape(batch * rows, -1)
        shift = self._shift.repeat(batch)[:, None]
        total = torch.zeros(batch * rows, dtype=torch.float64, device=x.device)
        for product in self._blocks:
            logits = product(flat)
            if held is not None:
                held.append(logits.clone())
            total += logits.sub_(shift).exp_().sum(-1)
        good = torch.isfinite(total) & (total > 1e-20) & (total < 1e20)
        result = total.log() + shift[:, 0].to(torch.float64)
        if not bool(good.all()):  # the textbook form, safe whatever the scale
            result[~good] = self._blocks.logits(flat[~good]).logsumexp(-1).to(torch.float64)
        return result.view(batch, rows)


def _sum_of_rows(weight: Tensor, y: Tensor) -> Tensor:
    return y @ weight


class OfStreams(Protocol):
    """A sum over the vocabulary, row by row of final streams."""

    def values(self, x: Tensor) -> Tensor:
        """[batch, rows, d_model] -> [batch, rows]"""

    def followed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and each value's gradient with respect to its stream. [batch, rows, d_model]"""


class _OverVocabulary(torch.autograd.Function):
    """A sum over the vocabulary that keeps no logits for its backward pass: rows do not mix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: OfStreams) -> Tensor:
        values, gradients = function.followed(x)
        ctx.save_for_backward(gradients)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (own,) = ctx.saved_tensors
        return own * gradient[..., None].to(own.dtype), None


def over_vocabulary(function: OfStreams, x: Tensor) -> Tensor:
    """A sum over the vocabulary, differentiable where `x` is. [batch, rows, d_model] -> [batch, rows]"""
    values: Tensor = _OverVocabulary.apply(x, function) if is_differentiated(x) else function.values(x)
    return values


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to some batch entries at a time, so that a block of their logits stays in cache.

    Args:
        function: [batch, rows, d_model] -> [batch, rows]
        x: [batch, rows, d_model]

    Returns:
        [batch, rows]
    """
    return torch.cat([function(some) for some in x.split(at_once(x))])


def followed_in_batches(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """The same for values and their gradients.

    Args:
        function: [batch, rows, d_model] -> [batch, rows] and [batch, rows, d_model]
        x: [batch, rows, d_model]
        vocab: Tokens whose logits are kept for each row.

    Returns:
        [batch, rows] and [batch, rows, d_model]
    """
    few = min(at_once(x), max(1, _HELD // (x.shape[1] * vocab)))
    values, gradients = zip(*map(function, x.split(few)), strict=True)
    return torch.cat(values), torch.cat(gradients)


def at_once(x: Tensor) -> int:
    """Batch entries whose logits in a block stay in cache."""
    return max(1, _ROWS // max(1, x.shape[1]))
