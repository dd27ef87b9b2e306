"""KL divergence from a distribution to one whose logits are near, without cancellation.

With `d` the change of the logits, and its mean `m = sum p d` taken off, `u = d - m`,

    KL(p || q) = log sum p exp(d) - sum p d = log(1 + sum p (exp(u) - 1 - u)),

where no term is negative. What `d` is wrong by counts times the change, what `m` is wrong by not at all in
first order. In `sum p (log p - log q)` rounding counts as it is, and is all that is left of a small KL.
"""

from __future__ import annotations

import torch
from torch import Tensor

SERIES = 0.125  # up to here the first terms of the series are exact in float32
LARGEST = 60.0  # exp of more, times the probability it is weighed by, leaves float32's range


def excess(u: Tensor) -> Tensor:
    """`exp(u) - 1 - u`, whose relative error is that of the dtype over `|u|`. [...]"""
    above = torch.expm1(u)
    return above - u if above.requires_grad else above.sub_(u)


def excess_by_series(u: Tensor) -> Tensor:
    """The same for `|u|` of at most `SERIES`, to float32's precision however small `u` is. [...]"""
    total = (u * (1 / 720)).add_(1 / 120)
    for term in (1 / 24, 1 / 6, 1 / 2):
        total.mul_(u).add_(term)
    return total.mul_(u).mul_(u)


def divergence(log_p: Tensor, change: Tensor) -> Tensor:
    """KL(p || q) row by row; differentiable with respect to the change.

    Args:
        log_p: Log probabilities, in float64. [rows, vocab]
        change: Logits of q minus those of p, in float64. [..., rows, vocab]

    Returns:
        [..., rows]
    """
    p = log_p.exp()
    mean = (p * change).sum(-1, keepdim=True)
    u = change - mean
    near = torch.log1p((p * excess(u.clamp(max=LARGEST))).sum(-1).clamp(min=0))
    is_near = u.amax(-1) <= LARGEST  # false for NaN too, which has to come through
    if bool(is_near.all()):
        return near
    far = (log_p + change).logsumexp(-1) - mean.squeeze(-1)
    return torch.where(is_near, near, far.clamp(min=0))
