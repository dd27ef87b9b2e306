"""KL to the full model from how the last stream differs from its, over the vocabulary in blocks."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from pahq_hf.engine.sparse.vocabulary import (
    BLOCK,
    Blocks,
    followed_in_batches,
    in_batches,
    over_vocabulary,
)
from pahq_hf.precision.embeddings import EmbeddingMatrix, exact_block
from pahq_hf.tasks.divergence import LARGEST, SERIES, divergence, excess, excess_by_series

_FAR = 16  # rows at once whose logits are all held
_NEAR = 8.0  # a ratio's logarithm up to which it is taken of `p` itself


class KLReadout:
    """`KL(full model || circuit)` in FP32, of hidden states after the final norm.

    The logits' change is the unembedding's product with the change of the hidden states: where that is small,
    the difference of two logits, each rounded by itself, would be mostly rounding.

    Args:
        reference: The full model's logits. [rows, vocab]
        unembedding: The model's unembedding, W_U [vocab, d_model].
        clean: The full model's hidden states after the final norm. [rows, d_model]
        scale: Factor of the logits.
        copies: Of the packed unembedding, as for `Blocks`.
        block: Tokens of the vocabulary at once.
    """

    def __init__(
        self,
        reference: Tensor,
        unembedding: nn.Linear | EmbeddingMatrix,
        clean: Tensor,
        *,
        scale: float = 1.0,
        copies: int = 2,
        block: int = BLOCK,
    ) -> None:
        self._reference = reference
        self._clean = clean
        self._scale = scale
        self._block = block
        self._blocks = Blocks(unembedding, None, copies=copies, block=block)  # a bias is the same in both
        p = reference.to(torch.float64).log_softmax(-1).exp()
        self._mean = torch.zeros(
            clean.shape, dtype=torch.float64, device=p.device
        )  # W_U^T p  [rows, d_model]
        self._longest = 0.0  # of the unembedding's rows
        for start in range(0, p.shape[1], block):  # in blocks: W_U in float64 would not fit
            tokens = slice(start, min(start + block, p.shape[1]))
            weight = exact_block(unembedding, tokens)
            self._mean += p[:, tokens] @ weight.to(torch.float64)
            self._longest = max(self._longest, float(weight.norm(dim=-1).max()))
        self._p = p.to(clean.dtype)  # [rows, vocab]

    def rows(self, x: Tensor) -> Tensor:
        """KL row by row. [batch, rows, d_model] -> [batch, rows] in float64"""
        return over_vocabulary(self, x)

    def values(self, x: Tensor) -> Tensor:
        """The same, of streams without gradients."""
        return in_batches(self._few, x)

    def followed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and gradients: the unembedding under `q - p`, without the cancellation of that.

        With the logits' change less its mean, u, that is `p (exp(u - KL) - 1)`.

        Args:
            x: Hidden states after the final norm. [batch, rows, d_model]

        Returns:
            [batch, rows] in float64, and [batch, rows, d_model]
        """
        return followed_in_batches(self._few_followed, x, self._blocks.vocab)

    def _few_followed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        held: list[Tensor] = []  # u of every block: the unembedding is read once less
        values = self._few(x, held)
        log_ratio = values.to(x.dtype)[..., None]
        total = torch.zeros_like(x.flatten(0, 1))
        parts = zip(
            held,
            self._blocks.turned(),
            self._p.split(self._block, dim=-1),
            self._log_p.split(self._block, dim=-1),
            strict=True,
        )
        for u, rows, p, log_p in parts:
            u.sub_(log_ratio)
            if bool((u <= _NEAR).all()):
                moved = u.expm1_().mul_(p)
            else:  # what is far more likely than in the full model may be 0 in `p`, and its ratio no number
                moved = torch.where(u <= _NEAR, torch.expm1(u).mul_(p), (log_p + u).exp_().sub_(p))
            total += rows(moved.flatten(0, 1))
        return values, total.mul_(self._scale).view(x.shape)

    @cached_property
    def _log_p(self) -> Tensor:
        """The full model's log probabilities. [rows, vocab]"""
        return self._reference.to(torch.float64).log_softmax(-1).to(self._p.dtype)

    def _few(self, x: Tensor, held: list[Tensor] | None = None) -> Tensor:
        """KL row by row of a few streams; the logits' change less its mean is left in `held`, by blocks."""
        batch, rows, _ = x.shape
        change = (x - self._clean) * self._scale
        mean = (change.to(torch.float64) * self._mean).sum(-1)
        furthest = float((change.norm(dim=-1) * self._longest + mean.abs()).max())  # |u| is no larger
        measure = excess_by_series if furthest <= SERIES and x.dtype == torch.float32 else excess
        shift, flat = mean.to(x.dtype)[..., None], change.flatten(0, 1)
        total, largest = torch.zeros_like(mean), torch.zeros_like(mean)
        for product, p in zip(self._blocks, self._p.split(self._block, dim=-1), strict=True):
            u = product(flat).view(batch, rows, -1).sub_(shift)
            if held is not None:
                held.append(u.clone())
            if not furthest <= LARGEST:
                largest = torch.maximum(largest, u.amax(-1))
            total += measure(u).mul_(p).sum(-1)
        result = total.clamp_(min=0).log1p_()
        if not furthest <= LARGEST:  # also where it is NaN, which has to come through
            for far in (~(largest <= LARGEST)).nonzero().split(_FAR):
                entry, row = far.T
                log_p = self._reference[row].to(torch.float64).log_softmax(-1)
                moved = self._blocks.logits(change[entry, row]).to(torch.float64)
                result[entry, row] = divergence(log_p, moved)
        return result
