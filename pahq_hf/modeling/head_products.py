"""Products over heads that attention and its pieces are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def per_head(x: Tensor, heads: int) -> Tensor:
    """Repeat keys or values that several heads share. [batch, group, ...] -> [batch, head, ...]"""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def read_out(weights: Tensor, v: Tensor) -> Tensor:
    """Probabilities times values.

    Args:
        weights: [batch, head, query, key]
        v: [batch, group, key, d_head]

    Returns:
        z. [batch, query, head, d_head]
    """
    return torch.matmul(weights, per_head(v, weights.shape[1])).transpose(1, 2)


def times_output(z: Tensor, heads: Sequence[int], weight: Tensor) -> Tensor:
    """Z W_O, of a whole weight [d_model, heads * d_head]. [..., head, d_head] -> [..., head, d_model]"""
    by_head = weight.unflatten(1, (-1, z.shape[-1]))[:, list(heads)]
    return torch.einsum("...hd,ohd->...ho", z, by_head)


def runs_of(heads: Sequence[int]) -> Iterator[range]:
    """Heads in order, as ranges that are as long as they can be."""
    start = 0
    for stop in range(1, len(heads) + 1):
        if stop == len(heads) or heads[stop] != heads[stop - 1] + 1:
            yield range(heads[start], heads[stop - 1] + 1)
            start = stop
