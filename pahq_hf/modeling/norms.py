"""Norms beyond those before a block: of queries and keys, of a block's output, and in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OLMO_EPSILON = 1e-5  # which none of its attributes tells


@dataclass(frozen=True)
class BlockOutput:
    """What a block adds to the stream, from what its last projection gives: `multiplier * norm(o)`.

    Attributes:
        norm: An RMS norm, or None.
        multiplier: A factor.
        offset: What the norm adds to its weight.
    """

    norm: nn.Module | None = None
    multiplier: float = 1.0
    offset: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether a block adds what its last projection gives."""
        return self.norm is None and self.multiplier == 1.0

    def __call__(self, o: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]"""
        y: Tensor = o if self.norm is None else self.norm(o)
        return y if self.multiplier == 1.0 else y * self.multiplier

    def scale(self, o: Tensor) -> Tensor | float:
        """The factor that depends on the input: `multiplier / rms(o)`.

        Args:
            o: [..., d_model]

        Returns:
            [..., 1], or a number where there is no norm.
        """
        if self.norm is None:
            return self.multiplier
        return torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + epsilon_of(self.norm)) * self.multiplier

    @property
    def gain(self) -> Tensor | None:
        """The factor that does not: the norm's weight. [d_model]"""
        if self.norm is None:
            return None
        weight: Tensor = self.norm.weight.detach()  # type: ignore[operator]
        return weight + self.offset

    def weighted(self, x: Tensor) -> Tensor:
        """Times the norm's weight, where there is a norm. [..., d_model]"""
        gain = self.gain
        return x if gain is None else x * gain


def epsilon_of(norm: nn.Module) -> float:
    """What a norm adds to the mean square."""
    value = getattr(norm, "variance_epsilon", None)
    return float(getattr(norm, "eps", _OLMO_EPSILON) if value is None else value)


# -- queries and keys -------------------------------------------------------------------------------


def norm_heads(norm: nn.Module, y: Tensor, blocks: Sequence[int], axis: int) -> Tensor:
    """Normalise queries or keys head by head, with the family's own norm.

    Args:
        norm: One norm for all heads, or with weights or modules of its own for each.
        y: d_head is the last axis.
        blocks: Which head (or group) each entry is of.
        axis: Where the entries are.

    Returns:
        The same shape.
    """
    if hasattr(norm, "norms"):  # StableLM: a module for each head
        own: Any = norm.norms
        parts = [own[block](part) for block, part in zip(blocks, y.unbind(axis), strict=True)]
        return torch.stack(parts, dim=axis)
    weight: Tensor | None = getattr(norm, "weight", None)
    if weight is not None and weight.ndim == 2:  # Cohere: a row for each head
        chosen = _with_weight(norm, weight[list(blocks)])(y.movedim(axis, -2))
        return chosen.movedim(-2, axis)
    result: Tensor = norm(y)
    return result


def norm_jointly(norm: nn.Module, y: Tensor, axis: int) -> Tensor:
    """Normalise the queries or keys of all heads together (OLMo 2).

    Where groups are split per query head, the weight is repeated as the keys are.

    Args:
        norm: Its weight spans all heads. [head * d_head]
        y: Every head, or every group, in order; d_head is the last axis.
        axis: Where the heads are.

    Returns:
        The same shape.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    entries, d_head = y.shape[axis], y.shape[-1]
    copies = entries * d_head // weight.shape[0]
    if copies > 1:
        norm = _with_weight(norm, weight.view(-1, d_head).repeat_interleave(copies, dim=0).flatten())
    joint: Tensor = norm(y.movedim(axis, -2).flatten(-2))
    return joint.unflatten(-1, (entries, d_head)).movedim(-2, axis)


def _with_weight(norm: nn.Module, weight: Tensor) -> nn.Module:
    """A norm that differs in its weight."""
    twin = copy.copy(norm)
    twin.__dict__["_parameters"] = {**norm._parameters, "weight": weight}
    return twin


# -- float64 ----------------------------------------------------------------------------------------


def widen_norms(model: nn.Module, offset: float) -> None:
    """Compute a float64 model's norms in float64: Hugging Face fixes some to float32. In place.

    Args:
        model: The model.
        offset: What its RMS norms add to their weight.
    """
    base: type[nn.Module]
    for norm in model.modules():
        name = type(norm).__name__
        if name.endswith("RMSNorm"):
            base, centred = _Float64RMSNorm, False
        elif name in ("CohereLayerNorm", "Cohere2LayerNorm"):
            base, centred = _Float64RMSNorm, True
        elif name == "OlmoLayerNorm":
            base, centred = _Float64PlainNorm, True
        else:
            continue
        norm.__class__ = type(f"Float64{name}", (base, type(norm)), {"centred": centred, "offset": offset})


class _Float64RMSNorm(nn.Module):
    """`(w + offset) * x / sqrt(mean(x^2) + eps)`, in the dtype of its input."""

    weight: Tensor
    centred: bool
    offset: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis."""
        x = hidden_states - hidden_states.mean(-1, keepdim=True) if self.centred else hidden_states
        variance = x.pow(2).mean(-1, keepdim=True)
        return (self.weight + self.offset) * (x * torch.rsqrt(variance + epsilon_of(self)))


class _Float64PlainNorm(nn.Module):
    """A layer norm without weights (OLMo), in the dtype of its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=epsilon_of(self))
