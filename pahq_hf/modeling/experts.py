"""A mixture of experts whose matrices are projections like all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pahq_hf.errors import UnsupportedModelError
from pahq_hf.precision.linear import PAHQLinear


class PAHQExperts(nn.Module):
    """The experts of one layer. Use `patch_experts`, not the constructor.

    Attributes:
        gate_up: For each expert, its gate and up projections, one above the other.
        down: For each expert, its down projection.
    """

    gate_up: nn.ModuleList
    down: nn.ModuleList
    act_fn: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts make of the tokens that the router sends them.

        Args:
            hidden_states: [tokens, d_model]
            top_k_index: Experts of each token. [tokens, k]
            top_k_weights: Their weights. [tokens, k]

        Returns:
            [tokens, d_model]
        """
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            made = self.down[expert](self._gated(self.gate_up[expert](hidden_states[token])))
            # No token meets an expert twice: the sum is in the order of the experts, on any device.
            out[token] += (made * top_k_weights[token, slot, None]).to(out.dtype)
        return out

    def _gated(self, gate_up: Tensor) -> Tensor:
        """As the family multiplies gate and up: GPT-OSS interleaves and bounds them."""
        own: Any = getattr(self, "_apply_gate", None)
        if own is not None:
            gated: Tensor = own(gate_up)
            return gated
        gate, up = gate_up.chunk(2, dim=-1)
        plain: Tensor = self.act_fn(gate) * up
        return plain

    def linears(self) -> list[PAHQLinear]:
        """All projections, expert by expert."""
        pairs = zip(self.gate_up, self.down, strict=True)
        return [linear for pair in pairs for linear in pair if isinstance(linear, PAHQLinear)]


def patch_experts(module: nn.Module) -> PAHQExperts:
    """Turn a family's stacked experts into projections, in place.

    Args:
        module: Holds `gate_up_proj` [expert, 2 * d_mlp, d_model] and `down_proj` [expert, d_model, d_mlp], or
            both the other way round (`is_transposed`), and biases where it has any.

    Returns:
        The same object, now `PAHQExperts` too.

    Raises:
        UnsupportedModelError: If it keeps its matrices in another way.
    """
    gate_up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None or gate_up.ndim != 3:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not keep its experts as stacked gate_up_proj and down_proj"
        )
    stacks = {"gate_up": _linears(module, "gate_up_proj"), "down": _linears(module, "down_proj")}
    for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
        module._parameters.pop(name, None)
    original = type(module)
    module.__class__ = type(f"PAHQ{original.__name__}", (PAHQExperts, original), {})
    assert isinstance(module, PAHQExperts)
    module.gate_up, module.down = stacks["gate_up"], stacks["down"]
    return module


def _linears(module: nn.Module, name: str) -> nn.ModuleList:
    """One projection for each expert of a stack."""
    weights, biases = module._parameters[name], module._parameters.get(f"{name}_bias")
    assert weights is not None
    stack = weights.detach()
    if getattr(module, "is_transposed", False):
        stack = stack.transpose(1, 2)
    own = [None] * len(stack) if biases is None else list(biases.detach())
    pairs = zip(stack, own, strict=True)
    return nn.ModuleList(PAHQLinear(weight.contiguous(), bias) for weight, bias in pairs)
