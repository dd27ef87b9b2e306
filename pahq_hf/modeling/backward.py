"""Functions whose backward pass is not their derivative: frozen norms, tempered softmax, scaled gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pahq_hf.errors import UnsupportedModelError
from pahq_hf.modeling.attention import Softmax, softmax
from pahq_hf.modeling.norms import epsilon_of
from pahq_hf.modeling.patched_model import PatchedModel

_CENTRED = ("CohereLayerNorm", "Cohere2LayerNorm", "OlmoLayerNorm")
_TOLERANCE = 1e-3  # by which what a norm puts out may differ from what is thought it computes


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def with_scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values, whose gradients are multiplied by a factor on their way back."""
    if factor == 1.0:
        return x
    scaled: Tensor = _Scaled.apply(x, factor)
    return scaled


class _Tempered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float) -> Tensor:
        ctx.temperature = temperature
        ctx.save_for_backward(scores)
        return softmax(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        flatter = softmax(scores / ctx.temperature)
        inside = (gradient * flatter).sum(-1, keepdim=True)
        return (flatter * (gradient - inside)).to(scores.dtype), None


def tempered(temperature: float) -> Softmax:
    """A softmax with the Jacobian diag(p) - p p^T of p = softmax(scores / temperature)."""
    if temperature == 1.0:
        return softmax

    def apply(scores: Tensor) -> Tensor:
        found: Tensor = _Tempered.apply(scores, temperature)
        return found

    return apply


# -- norms -------------------------------------------------------------------------------------------


class _Frozen(torch.autograd.Function):
    """A norm whose scale is a constant of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: _FrozenNorm, forward: Callable[[Tensor], Tensor]) -> Tensor:
        y = forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        moved = wide - wide.mean(-1, keepdim=True) if norm.centred else wide
        scale = torch.rsqrt(moved.square().mean(-1, keepdim=True) + epsilon_of(norm))
        gain, bias = norm.gain, getattr(norm, "bias", None)
        expected = moved * scale if gain is None else moved * scale * gain
        expected = expected if bias is None else expected + bias
        if (expected - y).abs().max() > _TOLERANCE * y.abs().max().clamp_min(1.0):
            raise UnsupportedModelError(
                f"method gim does not know how {type(norm).__name__.removeprefix('Frozen')} normalises: use "
                "another method"
            )
        ctx.norm = norm
        ctx.gain = gain
        ctx.save_for_backward(scale)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        passed = gradient if ctx.gain is None else gradient * ctx.gain
        if ctx.norm.centred:
            passed = passed - passed.mean(-1, keepdim=True)
        return (passed * scale).to(gradient.dtype), None, None


class _FrozenNorm(nn.Module):
    """Put before a norm's own class.

    Attributes:
        centred: Whether the mean is taken away.
        offset: What the norm adds to its weight.
    """

    centred: bool
    offset: float

    @property
    def gain(self) -> Tensor | None:
        """What the normalised input is multiplied by."""
        weight = self._parameters.get("weight")
        return None if weight is None else weight.detach() + self.offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis."""
        y: Tensor = _Frozen.apply(hidden_states, self, super().forward)
        return y


@contextmanager
def frozen_norms(model: PatchedModel) -> Iterator[None]:
    """Inside, the scale of every norm is a constant of backward passes; what norms put out is the same.

    Args:
        model: The patched model.

    Raises:
        UnsupportedModelError: If a norm is of an unknown kind.
    """
    _check_rooms(model)
    before: list[tuple[nn.Module, type[nn.Module], Any]] = []
    try:
        for norm in model.hf.modules():
            centred = _is_centred(norm)
            if centred is None:
                continue
            own, wrapped = type(norm), vars(norm).get("_old_forward")
            facts = {"centred": centred, "offset": model.arch.norm_offset}
            norm.__class__ = type(f"Frozen{own.__name__}", (_FrozenNorm, own), facts)
            before.append((norm, own, wrapped))
            if wrapped is not None:  # accelerate's hooks call the forward they found
                vars(norm)["_old_forward"] = MethodType(type(norm).forward, norm)
        yield
    finally:
        for norm, own, wrapped in before:
            norm.__class__ = own
            if wrapped is not None:
                vars(norm)["_old_forward"] = wrapped


def _is_centred(norm: nn.Module) -> bool | None:
    """Whether a norm takes the mean away; None of other modules."""
    name = type(norm).__name__
    if name.endswith("RMSNorm"):
        return False
    centred = isinstance(norm, nn.LayerNorm) or name.endswith(_CENTRED)
    return True if centred else None


def _check_rooms(model: PatchedModel) -> None:
    rooms = [model.final_norm]
    for layer in model.layers:
        post = [
            output.norm for output in (layer.attention.output, layer.mlp.output) if output.norm is not None
        ]
        rooms += [layer.attention_norm, layer.mlp_norm, *post]
    for norm in rooms:
        if not isinstance(norm, nn.Identity) and _is_centred(norm) is None:
            raise UnsupportedModelError(
                f"method gim does not know the norm {type(norm).__name__}: use another method"
            )
