"""A metric from the last residual stream, without ever storing logits over the vocabulary.

KL is `engine/sparse/kl.py`'s. Other metrics need a few columns of the unembedding and, for probabilities, a
logsumexp over the vocabulary, which is taken in blocks that stay in cache.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import exact_logits
from pahq_hf.engine.sparse.kl import KLReadout
from pahq_hf.engine.sparse.vocabulary import BLOCK, SMALLEST, Vocabulary
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.embeddings import exact_rows
from pahq_hf.tasks.metrics import Metric
from pahq_hf.tasks.targets import FinalStream, TokenSets

_LOGITS = 1 << 23  # at once, where all are needed


class Readout:
    """Evaluates a metric on normalised final hidden states.

    A metric is asked for its value from the stream. Where it has no such form, or where logits are bounded
    (Gemma 2) and no term is linear in the stream, it gets logits, of a few streams at a time.

    Args:
        metric: The metric, bound to the task and the full model's logits.
        model: The patched model.
        clean: The full model's run.
        copies: Of the packed unembedding that may be kept.
    """

    def __init__(self, metric: Metric, model: PatchedModel, clean: Activations, *, copies: int = 2) -> None:
        self._metric = metric
        self._model = model
        self._clean = clean
        self._copies = copies
        self._block = BLOCK
        self._is_linear = model.arch.logit_softcap is None
        self._directions: dict[tuple[TokenSets, TokenSets], tuple[Tensor, Tensor]] = {}

    def give_way(self) -> bool:
        """After memory ran out: keep nothing of the vocabulary, and take fewer of its tokens at once.

        Returns:
            False if nothing was kept, and it was the fewest, already.
        """
        more = self._copies > 0 or self._block > SMALLEST
        self._copies = 0
        self._block = max(SMALLEST, self._block // 4)
        for name in ("kl", "logsumexp"):
            self.__dict__.pop(name, None)  # made anew when it is wanted
        self._directions.clear()
        return more

    def __call__(self, x: Tensor) -> Tensor:
        """The metric of each batch entry. [batch, rows, d_model] -> [batch] in float64"""
        return self._metric.reduce(self.rows(x))

    def rows(self, x: Tensor) -> Tensor:
        """The metric row by row.

        Args:
            x: Hidden states after the final norm. [batch, rows, d_model]

        Returns:
            [batch, rows] in float64
        """
        if self._is_linear and self._metric.spec.from_stream is not None:
            return self._metric.rows_of_stream(self.stream(x), x.shape[:2])
        few = max(1, _LOGITS // (x.shape[1] * self._model.vocab_size))
        with self._model.exact_embeddings():
            return torch.cat(
                [self._metric.rows(exact_logits(self._model, self._clean, some)) for some in x.split(few)]
            )

    def stream(self, x: Tensor) -> FinalStream:
        """What a metric may ask of final streams, given after the final norm. [batch, rows, d_model]"""
        return _Streams(self, x)

    # -- of the unembedding, made when a metric first wants it --------------------------------------------

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return self._model.arch.logit_scale

    @cached_property
    def kl(self) -> KLReadout:
        """KL divergence from the full model."""
        reference = self._clean.logits
        return KLReadout(
            reference,
            self._model.unembedding,
            self._clean.final_out,
            scale=self.scale,
            copies=self._copies,
            block=self._block,
        )

    @cached_property
    def logsumexp(self) -> Vocabulary:
        """Of all logits. Any value near the result keeps exponentials in range; a fixed one repeats."""
        shift = self._clean.logits.logsumexp(-1)
        return Vocabulary(self._model.unembedding, self.bias, shift, copies=self._copies, block=self._block)

    @cached_property
    def bias(self) -> Tensor | None:
        """What is added to the scaled products. [vocab]"""
        bias: Tensor | None = self._model.unembedding.bias
        return None if bias is None else bias.detach() * self.scale

    def columns(self, tokens: TokenSets) -> tuple[Tensor, Tensor | None]:
        """The unembedding's columns of some tokens. [rows, width, d_model], [rows, width]"""
        columns = exact_rows(self._model.unembedding, tokens.ids).to(torch.float64)
        return columns, None if self.bias is None else self.bias[tokens.ids].to(torch.float64)

    def direction(self, plus: TokenSets, minus: TokenSets) -> tuple[Tensor, Tensor]:
        """The mean column of one set minus that of another, and their biases'. [rows, d_model], [rows]"""
        if (plus, minus) not in self._directions:
            (more, more_bias), (less, less_bias) = self._mean_column(plus), self._mean_column(minus)
            self._directions[plus, minus] = more - less, more_bias - less_bias
        return self._directions[plus, minus]

    def _mean_column(self, tokens: TokenSets) -> tuple[Tensor, Tensor]:
        columns, bias = self.columns(tokens)
        share = tokens.mask / tokens.mask.sum(-1, keepdim=True)  # [rows, width]
        direction = (columns * share[..., None]).sum(1)
        return direction, share.new_zeros(len(share)) if bias is None else (bias * share).sum(1)


class _Streams:
    """Some circuits' final streams, as a metric sees them."""

    def __init__(self, readout: Readout, x: Tensor) -> None:
        self._readout = readout
        self._x = x  # [batch, rows, d_model]
        self._scaled = x if readout.scale == 1.0 else x * readout.scale

    def columns(self, tokens: TokenSets) -> Tensor:
        """Logits of each row's tokens. [batch, rows, width]"""
        columns, bias = self._readout.columns(tokens)
        logits = torch.einsum("brd,rwd->brw", self._scaled.to(torch.float64), columns)
        return logits if bias is None else logits + bias

    def direction(self, plus: TokenSets, minus: TokenSets) -> Tensor:
        """The mean logit of one set without that of another. [batch, rows]"""
        direction, offset = self._readout.direction(plus, minus)
        return (self._scaled.to(torch.float64) * direction).sum(-1) + offset

    def logsumexp(self) -> Tensor:
        """Log of the sum of all exponentiated logits. [batch, rows]"""
        return self._readout.logsumexp(self._scaled)

    def divergence(self) -> Tensor:
        """KL divergence from the full model. [batch, rows]"""
        return self._readout.kl.rows(self._x)
