"""Embedding and unembedding in low precision, with FP32 rows on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pahq_hf.precision.backward import differentiable, is_differentiated
from pahq_hf.precision.weights import WeightMatrix

_BLOCK = 2048  # rows at once


class EmbeddingMatrix(WeightMatrix):
    """A matrix with one row for each token, [vocab, d_model], never decoded as a whole."""

    @property
    def is_full(self) -> bool:
        """Whether it is FP32 at present whatever it is kept in."""
        return self.shared.mode.has_exact_embeddings

    def forward(self, x: Tensor) -> Tensor:
        """Scores of all tokens. [..., d_model] -> [..., vocab]"""
        if self.low is not None and is_differentiated(x):
            return differentiable(self, x)
        return self._scores(x, self.bias)

    def change(self, x: Tensor) -> Tensor:
        """What a change of the input changes, without the bias. [..., d_model] -> [..., vocab]"""
        if self.low is not None and is_differentiated(x):
            return differentiable(_Change(self), x)
        return self._scores(x, None)

    def _scores(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scores = []
        for rows in self._row_blocks():
            scores.append(F.linear(x, self.dense(rows), None if bias is None else bias[rows]))
        return torch.cat(scores, dim=-1)

    def transposed(self, y: Tensor) -> Tensor:
        """`y W`, of a backward pass. [..., vocab] -> [..., d_model]"""
        total = y.new_zeros(*y.shape[:-1], self.in_features)
        for rows in self._row_blocks():
            total += y[..., rows] @ self.dense(rows)
        return total

    def _row_blocks(self) -> Iterator[slice]:
        for start in range(0, self.out_features, _BLOCK):
            yield slice(start, min(start + _BLOCK, self.out_features))

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of some tokens at the current precision. [...] -> [..., d_model]"""
        return _each_once(self.dense, ids)

    def exact_rows(self, ids: Tensor) -> Tensor:
        """FP32 rows of some tokens, whatever the precision. [...] -> [..., d_model]"""
        return _each_once(self.exact, ids)


class _Change:
    """`EmbeddingMatrix.change` as a product that keeps no weight for its backward pass."""

    def __init__(self, table: EmbeddingMatrix) -> None:
        self.forward = table.change
        self.transposed = table.transposed


def _each_once(read: Callable[[slice], Tensor], ids: Tensor) -> Tensor:
    """Rows of some tokens, each read once. [...] -> [..., d_model]"""
    distinct, place = ids.unique(return_inverse=True)
    return torch.cat([read(slice(token, token + 1)) for token in distinct.tolist()])[place]


class PAHQEmbedding(nn.Embedding):
    """An embedding that looks its rows up in a `EmbeddingMatrix`."""

    table: EmbeddingMatrix

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., d_model]"""
        return self.table.rows(input)


def patch_embedding(module: nn.Embedding, table: EmbeddingMatrix) -> None:
    """Let an embedding look rows up in a table, in place.

    Args:
        module: An `nn.Embedding`, or a family's own kind of it (Gemma's multiplies by sqrt(d_model)).
        table: The rows.
    """
    kind = type(module)
    bases = (PAHQEmbedding,) if kind is nn.Embedding else (kind, PAHQEmbedding)
    del module._parameters["weight"]
    module.__class__ = type(f"PAHQ{kind.__name__}", bases, {})
    module.table = table
    # Families ask their embedding for its weight's dtype: not a parameter, and without rows.
    object.__setattr__(module, "weight", torch.empty(0, module.embedding_dim))


def exact_rows(unembedding: nn.Module, ids: Tensor) -> Tensor:
    """FP32 rows of an unembedding, kept in full or not. [...] -> [..., d_model]"""
    if isinstance(unembedding, EmbeddingMatrix):
        return unembedding.exact_rows(ids)
    weight: Tensor = unembedding.weight.detach()  # type: ignore[operator]
    return weight[ids]


def exact_block(unembedding: nn.Module, rows: slice) -> Tensor:
    """Consecutive FP32 rows of an unembedding, kept in full or not. [rows, d_model]"""
    if isinstance(unembedding, EmbeddingMatrix):
        return unembedding.exact(rows)
    weight: Tensor = unembedding.weight.detach()  # type: ignore[operator]
    return weight[rows]
