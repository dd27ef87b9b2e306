"""Gradients through projections that are not resident in FP32."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Projection(Protocol):
    """What a product needs of a projection, forwards and backwards."""

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`. [..., in] -> [..., out]"""

    def transposed(self, y: Tensor) -> Tensor:
        """`y W`. [..., out] -> [..., in]"""


class _Product(torch.autograd.Function):
    """`x W^T + b` that keeps no weight for its backward pass: W is decoded again, at the precision then.

    PyTorch's own linear would keep every decoded FP32 matrix until the backward pass, and packed products
    have no backward pass at all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        y = projection.forward(x)  # without gradients, as everywhere in here
        # Falcon adds to a product in place, which PyTorch forbids where it is a view made in here.
        return y.clone() if y._is_view() else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.projection.transposed(gradient), None


def is_differentiated(x: Tensor) -> bool:
    """Whether gradients will be asked for with respect to this input."""
    return x.requires_grad and torch.is_grad_enabled()


def differentiable(projection: Projection, x: Tensor) -> Tensor:
    """The projection's product with a backward pass. [..., in] -> [..., out]

    The forward pass runs at the projection's precision now, the backward pass at that of its own time.
    """
    y: Tensor = _Product.apply(x, projection)
    return y
