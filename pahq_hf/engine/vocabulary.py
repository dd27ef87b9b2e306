"""The logarithm of the sum over the vocabulary, in blocks that stay in cache; logits are never stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pahq_hf.precision import Product

_BLOCK = 2048  # tokens of the vocabulary, and
_ROWS = 512  # rows, that are scored at once: measured


class Vocabulary:
    """`logsumexp(x W_U^T + b)` in FP32.

    Args:
        weight: Unembedding. [vocab, d_model]
        bias: Its bias. [vocab]
        shift: A value near each row's result, which keeps exponentials in range. [rows]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, shift: Tensor) -> None:
        self._weight = weight
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
        self._blocks = self._blocks or packed_blocks(self._weight, self._bias)
        for product in self._blocks:
            total += product(flat).sub_(shift).exp_().sum(-1)
        good = torch.isfinite(total) & (total > 1e-20) & (total < 1e20)
        result = total.log() + shift[:, 0].to(torch.float64)
        if not bool(good.all()):
            result[~good] = self._textbook(flat[~good]).to(torch.float64)
        return result.view(batch, rows)

    def _textbook(self, x: Tensor) -> Tensor:
        """The textbook form, safe whatever the scale. [n, d_model] -> [n]"""
        return torch.logsumexp(F.linear(x, self._weight, self._bias), dim=-1)


def packed_blocks(weight: Tensor, bias: Tensor | None) -> list[Product]:
    """The unembedding cut into packed blocks."""
    blocks = []
    for start in range(0, weight.shape[0], _BLOCK):
        part = None if bias is None else bias[start : start + _BLOCK]
        blocks.append(Product(weight[start : start + _BLOCK], part))
    return blocks


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to some batch entries at a time, so that a block of their logits stays in cache.

    Args:
        function: [batch, rows, d_model] -> [batch, rows]
        x: [batch, rows, d_model]

    Returns:
        [batch, rows]
    """
    return torch.cat([function(some) for some in x.split(max(1, _ROWS // max(1, x.shape[1])))])
