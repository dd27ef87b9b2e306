"""What a metric is computed from: the tokens it compares, and logits or final streams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pahq_hf.errors import MetricError

if TYPE_CHECKING:  # torch takes seconds to import
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenSets:
    """One set of tokens per row, padded.

    Attributes:
        ids: Token ids. [rows, width]
        mask: 1 where an id is real, 0 in the padding. [rows, width]
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, sets: Sequence[Sequence[int]], device: torch.device) -> TokenSets:
        """Pad sets of token ids."""
        import torch

        width = max((len(tokens) for tokens in sets), default=0)
        ids = torch.zeros(len(sets), max(width, 1), dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.float64)
        for row, tokens in enumerate(sets):
            ids[row, : len(tokens)] = torch.tensor(list(tokens), dtype=torch.long)
            mask[row, : len(tokens)] = 1
        return cls(ids.to(device), mask.to(device))

    def gather(self, values: Tensor) -> Tensor:
        """Values of the set's tokens. [..., rows, vocab] -> [..., rows, width]

        On a GPU by an index, whose gradients are added up in a fixed order; those of `torch.gather` are not.
        """
        import torch

        if values.device.type == "cpu":
            return values.gather(-1, self.ids.expand(*values.shape[:-1], self.ids.shape[-1]))
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        return values[..., rows, self.ids]

    def total(self, values: Tensor) -> Tensor:
        """Sum over each set. [..., rows, width] -> [..., rows]"""
        return (values * self.mask).sum(-1)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each set. [..., rows, width] -> [..., rows]"""
        return self.total(values) / self.mask.sum(-1)

    def logsumexp(self, values: Tensor) -> Tensor:
        """Log of the sum of each set's exponentials, which may all be 0. [..., rows, width] -> [..., rows]"""
        return values.masked_fill(self.mask == 0, -math.inf).logsumexp(-1)


@dataclass(frozen=True, eq=False)
class Targets:
    """What a metric compares logits with.

    Attributes:
        answers: The right answers of each row.
        distractors: The wrong ones.
        logits: The full model's, for a metric that needs the `reference`. [rows, vocab]
    """

    answers: TokenSets
    distractors: TokenSets
    logits: Tensor | None = None

    @property
    def reference(self) -> Tensor:
        """The full model's logits. [rows, vocab]

        Raises:
            MetricError: If the metric does not need them.
        """
        if self.logits is None:
            raise MetricError(
                "a metric that compares with the full model's logits says so where it is registered: "
                "needs=('reference',)"
            )
        return self.logits

    def reference_log_probs(self) -> Tensor:
        """The full model's log probabilities. [rows, vocab] in float64"""
        return self.reference.double().log_softmax(-1)


class FinalStream(Protocol):
    """Final residual streams of some circuits side by side, of which a metric asks what it needs.

    Logits over the whole vocabulary are never stored. All results are in float64.
    """

    def columns(self, tokens: TokenSets) -> Tensor:
        """Logits of each row's tokens. [batch, rows, width]"""

    def direction(self, plus: TokenSets, minus: TokenSets) -> Tensor:
        """The mean logit of one set without that of another: one product with one vector. [batch, rows]"""

    def logsumexp(self) -> Tensor:
        """Log of the sum of all exponentiated logits. [batch, rows]"""

    def divergence(self) -> Tensor:
        """KL divergence from the full model, without cancellation near 0. [batch, rows]"""
