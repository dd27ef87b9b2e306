"""The logarithm of the sum over the vocabulary, in blocks that stay in cache; logits are never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from pahq_hf.precision import PAHQTable, Product, exact_block

_BLOCK = 2048  # tokens of the vocabulary, and
_ROWS = 512  # rows, that are scored at once: measured


class Vocabulary:
    """`logsumexp(x W_U^T + b)` in FP32.

    Args:
        unembedding: The unembedding, W_U [vocab, d_model].
        bias: Its bias. [vocab]
        shift: A value near each row's result, which keeps exponentials in range. [rows]
        hold: Keep the unembedding packed; otherwise it is packed block by block at every call.
    """

    def __init__(
        self,
        unembedding: nn.Linear | PAHQTable,
        bias: Tensor | None,
        shift: Tensor,
        *,
        hold: bool = True,
    ) -> None:
        self._hold = hold
        self._unembedding = unembedding
        self._bias = bias
        self._shift = shift
        self._blocks: list[Product] = []

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, rows, d_model] -> [batch, rows] in float64"""
        return in_batches(self._few, x)

    def _few(self, x: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        flat = x.reshape(batch * rows, -1)
        shift = self._shift.repeat(batch)[:, None]
        total = torch.zeros(batch * rows, dtype=torch.float64, device=x.device)
        for product in self._products():
            total += product(flat).sub_(shift).exp_().sum(-1)
        good = torch.isfinite(total) & (total > 1e-20) & (total < 1e20)
        result = total.log() + shift[:, 0].to(torch.float64)
        if not bool(good.all()):
            result[~good] = self._textbook(flat[~good]).to(torch.float64)
        return result.view(batch, rows)

    def _products(self) -> Iterable[Product]:
        """The unembedding's blocks."""
        if not self._hold:
            return packed_blocks(self._unembedding, self._bias)
        self._blocks = self._blocks or list(packed_blocks(self._unembedding, self._bias))
        return self._blocks

    def _textbook(self, x: Tensor) -> Tensor:
        """The textbook form, safe whatever the scale. [n, d_model] -> [n]"""
        blocks = [product(x) for product in packed_blocks(self._unembedding, self._bias)]
        return torch.logsumexp(torch.cat(blocks, dim=-1), dim=-1)


def packed_blocks(unembedding: nn.Linear | PAHQTable, bias: Tensor | None) -> Iterator[Product]:
    """The unembedding cut into packed blocks, one at a time."""
    vocab = unembedding.out_features
    for start in range(0, vocab, _BLOCK):
        rows = slice(start, min(start + _BLOCK, vocab))
        yield Product(exact_block(unembedding, rows), None if bias is None else bias[rows])


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to some batch entries at a time, so that a block of their logits stays in cache.

    Args:
        function: [batch, rows, d_model] -> [batch, rows]
        x: [batch, rows, d_model]

    Returns:
        [batch, rows]
    """
    return torch.cat([function(some) for some in x.split(max(1, _ROWS // max(1, x.shape[1])))])
