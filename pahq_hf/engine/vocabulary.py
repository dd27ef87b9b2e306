"""The logarithm of the sum over the vocabulary, in blocks that stay in cache; logits are never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
        packed: Keep a copy packed for the processor: for many calls.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, shift: Tensor, *, packed: bool = True) -> None:
        self._weight = weight
        self._bias = bias
        self._shift = shift
        self._packed = packed
        self._blocks: list[Product] = []

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, rows, d_model] -> [batch, rows] in float64"""
        return in_batches(self._few, x)

    def _few(self, x: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        flat = x.reshape(batch * rows, -1)
        shift = self._shift.repeat(batch)[:, None]
        total = torch.zeros(batch * rows, dtype=torch.float64, device=x.device)
        for logits in self._logits(flat):
            total += logits.sub_(shift).exp_().sum(-1)
        return _finished(total, shift[:, 0], flat, self.textbook).view(batch, rows)

    def _logits(self, x: Tensor) -> Iterator[Tensor]:
        if self._packed:
            self._blocks = self._blocks or packed_blocks(self._weight, self._bias)
            for product in self._blocks:
                yield product(x)
            return
        for start in range(0, self._weight.shape[0], _BLOCK):
            bias = None if self._bias is None else self._bias[start : start + _BLOCK]
            yield F.linear(x, self._weight[start : start + _BLOCK], bias)

    def textbook(self, x: Tensor) -> Tensor:
        """The textbook form, safe whatever the scale. [n, d_model] -> [n]"""
        return torch.logsumexp(F.linear(x, self._weight, self._bias), dim=-1)


class AnchoredVocabulary:
    """The same near an anchor: FP32 logits there, and BF16 products with differences from it.

    logits(x) = logits(x0) + W_U (x - x0): as for every anchored linear map, rounding is relative to the
    difference, and nothing is rounded where there is none.

    Args:
        exact: The FP32 form, for what is out of range.
        weight: Unembedding. [vocab, d_model]
        bias: Its bias. [vocab]
    """

    def __init__(self, exact: Vocabulary, weight: Tensor, bias: Tensor | None) -> None:
        self._exact = exact
        self._weight = weight
        self._bias = bias
        self._blocks: list[Product] = []
        self._x0 = weight.new_empty(0, weight.shape[1])
        self._logits = weight.new_empty(0, weight.shape[0])
        self._shift = weight.new_empty(0)

    def anchor(self, x0: Tensor) -> None:
        """Take a new anchor. [rows, d_model]"""
        logits = F.linear(x0, self._weight, self._bias)
        self._shift = logits.logsumexp(-1)
        self._logits = logits.sub_(self._shift[:, None])
        self._x0 = x0

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, rows, d_model] -> [batch, rows] in float64"""
        return in_batches(self._few, x)

    def _few(self, x: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        moved = (x - self._x0).to(torch.bfloat16).flatten(0, 1)
        total = torch.zeros(batch * rows, dtype=torch.float64, device=x.device)
        self._blocks = self._blocks or packed_blocks(self._weight.to(torch.bfloat16), None)
        for number, product in enumerate(self._blocks):
            logits = product.raw(moved).to(x.dtype).view(batch, rows, -1)
            logits += self._logits[:, number * _BLOCK : (number + 1) * _BLOCK]
            total += logits.exp_().sum(-1).flatten()
        flat = x.reshape(batch * rows, -1)
        return _finished(total, self._shift.repeat(batch), flat, self._exact.textbook).view(batch, rows)


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


def _finished(total: Tensor, shift: Tensor, x: Tensor, textbook: Callable[[Tensor], Tensor]) -> Tensor:
    """`log(total) + shift`, recomputed where the sum left the range of its arithmetic."""
    good = torch.isfinite(total) & (total > 1e-20) & (total < 1e20)
    result = total.log() + shift.to(torch.float64)
    if not bool(good.all()):
        result[~good] = textbook(x[~good]).to(torch.float64)
    return result
