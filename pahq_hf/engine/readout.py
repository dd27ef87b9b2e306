"""The metric from the last residual stream, without ever storing logits over the vocabulary.

KL is `engine/kl.py`'s. The other metrics need a few columns of the unembedding and, for probabilities, a
logsumexp over the vocabulary, which is taken in blocks that stay in cache.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pahq_hf.capture import Activations, exact_logits
from pahq_hf.engine.kl import KLReadout
from pahq_hf.engine.vocabulary import Vocabulary
from pahq_hf.metrics import Metric, TokenSets
from pahq_hf.patch import PatchedModel
from pahq_hf.precision import PAHQTable, exact_rows

_LOGITS = 1 << 23  # at once, where all are needed


class MetricReader(Protocol):
    """Evaluates a metric on normalised final hidden states."""

    def __call__(self, x: Tensor) -> Tensor:
        """The metric of each batch entry. [batch, rows, d_model] -> [batch] in float64"""


def make_readout(
    metric: Metric, model: PatchedModel, clean: Activations, *, hold: bool = True
) -> MetricReader:
    """What reads a metric of a model's last stream.

    Args:
        metric: The metric, bound to the task and the full model's logits.
        model: The patched model.
        clean: The full model's run.
        hold: Keep the unembedding packed for products.
    """
    if model.arch.logit_softcap is not None:
        return CappedReadout(metric, model, clean)
    scale = model.arch.logit_scale
    if metric.name == "kl":
        return KLReadout(metric, model.unembedding, clean.final_out, scale=scale, hold=hold)
    return Readout(metric, model.unembedding, clean.logits, scale=scale, hold=hold)


class CappedReadout:
    """Evaluates a metric where logits are bounded (Gemma 2): no term of it is linear in the stream.

    Args:
        metric: The metric, bound to the task and the full model's logits.
        model: The patched model.
        clean: The full model's run.
    """

    def __init__(self, metric: Metric, model: PatchedModel, clean: Activations) -> None:
        self._metric = metric
        self._model = model
        self._clean = clean

    def rows(self, x: Tensor) -> Tensor:
        """The metric row by row. [batch, rows, d_model] -> [batch, rows] in float64"""
        few = max(1, _LOGITS // (x.shape[1] * self._model.vocab_size))
        with self._model.exact_tables():
            return torch.cat(
                [self._metric.rows(exact_logits(self._model, self._clean, some)) for some in x.split(few)]
            )

    def __call__(self, x: Tensor) -> Tensor:
        """The metric of each batch entry. [batch, rows, d_model] -> [batch] in float64"""
        return self._metric.reduce(self.rows(x))


class Readout:
    """Evaluates a metric other than KL on normalised final hidden states.

    Args:
        metric: The metric, bound to the task and the full model's logits.
        unembedding: The model's unembedding.
        clean_logits: The full model's logits. [rows, vocab]
        scale: Factor of the logits.
        hold: Keep the unembedding packed for products.
    """

    def __init__(
        self,
        metric: Metric,
        unembedding: nn.Linear | PAHQTable,
        clean_logits: Tensor,
        *,
        scale: float = 1.0,
        hold: bool = True,
    ) -> None:
        self.metric = metric
        self._scale = scale
        self._unembedding = unembedding  # [vocab, d_model], FP32 here whatever it is kept in
        bias = unembedding.bias
        self._bias: Tensor | None = None if bias is None else bias.detach() * scale
        # Any value near the result keeps the exponentials in range; a fixed one keeps runs repeatable.
        self._logsumexp = Vocabulary(unembedding, self._bias, clean_logits.logsumexp(-1), hold=hold)
        if metric.name == "logit_diff":
            self._direction, self._offset = self._difference()

    def _difference(self) -> tuple[Tensor, Tensor]:
        """Mean answer column minus mean distractor column. [rows, d_model], [rows]"""
        right, right_bias = self._mean_column(self.metric.answers)
        wrong, wrong_bias = self._mean_column(self.metric.distractors)
        return right - wrong, right_bias - wrong_bias

    def _mean_column(self, sets: TokenSets) -> tuple[Tensor, Tensor]:
        share = sets.mask / sets.mask.sum(-1, keepdim=True)  # [rows, width]
        columns = exact_rows(self._unembedding, sets.ids).to(torch.float64)  # [rows, width, d_model]
        direction = (columns * share[..., None]).sum(1)
        if self._bias is None:
            return direction, torch.zeros(len(share), dtype=torch.float64, device=share.device)
        return direction, (self._bias[sets.ids].to(torch.float64) * share).sum(1)

    def rows(self, x: Tensor) -> Tensor:
        """The metric row by row.

        Args:
            x: Hidden states after the final norm. [batch, rows, d_model]

        Returns:
            [batch, rows] in float64
        """
        name = self.metric.name
        if self._scale != 1.0:
            x = x * self._scale
        if name == "logit_diff":
            return -((x.to(torch.float64) * self._direction).sum(-1) + self._offset)
        lse = self._logsumexp(x)
        right = self._probability(x, self.metric.answers, lse)
        if name == "prob_diff":
            return self._probability(x, self.metric.distractors, lse) - right
        return -right.log()

    def __call__(self, x: Tensor) -> Tensor:
        """The metric of each batch entry. [batch, rows, d_model] -> [batch] in float64"""
        return self.metric.reduce(self.rows(x))

    def _probability(self, x: Tensor, sets: TokenSets, lse: Tensor) -> Tensor:
        columns = exact_rows(self._unembedding, sets.ids).to(torch.float64)  # [rows, width, d_model]
        logits = torch.einsum("brd,rwd->brw", x.to(torch.float64), columns)
        if self._bias is not None:
            logits = logits + self._bias[sets.ids].to(torch.float64)
        return sets.total((logits - lse[..., None]).exp())
