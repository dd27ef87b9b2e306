"""Turn the projections of a Hugging Face model into `PAHQLinear`s, and its attention into `PAHQAttention`."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from pahq_hf.errors import ConfigError
from pahq_hf.modeling.architectures.architecture import Architecture
from pahq_hf.modeling.attention import PAHQAttention
from pahq_hf.modeling.norms import BlockOutput
from pahq_hf.precision.linear import PAHQLinear


def patch_attention(
    module: nn.Module,
    row: Architecture,
    number: int,
    n_heads: int,
    n_groups: int,
    output: BlockOutput | None = None,
) -> PAHQAttention:
    """Turn a Hugging Face attention module into PAHQ attention, in place.

    Args:
        module: The family's attention module.
        row: Its row of the table.
        number: Of its layer.
        n_heads: Query heads.
        n_groups: Key/value groups.
        output: What follows the output projection.

    Returns:
        The same object, now a `PAHQAttention` too.

    Raises:
        ConfigError: If the module is patched already.
    """
    if isinstance(module, PAHQAttention):
        raise ConfigError("this model is patched already; wrap a freshly loaded one")
    q, k, v = _split_qkv(module, row, n_heads, n_groups)
    out = linear_from(row.find(module, row.out), row)
    for name in (*row.qkv, row.out):
        del module._modules[name]
    original = type(module)
    module.__class__ = type(f"PAHQ{original.__name__}", (PAHQAttention, original), {})
    assert isinstance(module, PAHQAttention)
    module.q_proj, module.k_proj, module.v_proj, module.o_proj = q, k, v, out
    module.n_heads, module.n_groups = n_heads, n_groups
    module.d_head = q.out_features // n_heads
    module.row, module.family = row, original
    module.scaling = float(row.scaling(module))
    module.softcap = getattr(module, row.softcap) if row.softcap else None
    # Not attributes: as such their parameters would have two names.
    module._norms = {
        kind: row.find(module, name) for kind, name in zip("qk", row.qk_norm or (), strict=False)
    }
    module.output = output or BlockOutput()
    module.layer_idx = number
    if "_old_forward" in vars(module):  # accelerate's hooks call the forward they found: give them ours
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)
    return module


def _split_qkv(
    module: nn.Module, row: Architecture, n_heads: int, n_groups: int
) -> tuple[PAHQLinear, PAHQLinear, PAHQLinear]:
    if len(row.qkv) == 3:
        q, k, v = (linear_from(row.find(module, name), row) for name in row.qkv)
        return q, k, v
    weight, bias = _oriented(row.find(module, row.qkv[0]), row)
    ranges = qkv_ranges(row, weight.shape[0], n_heads, n_groups)

    def cut(values: Tensor, kind: str) -> Tensor:
        # A plain clone keeps Conv1D's strides; contiguous rows are what reading one head's weights needs.
        return torch.cat([values[start:stop] for start, stop in ranges[kind]]).contiguous()

    q, k, v = (PAHQLinear(cut(weight, kind), None if bias is None else cut(bias, kind)) for kind in "qkv")
    return q, k, v


def qkv_ranges(row: Architecture, rows: int, n_heads: int, n_groups: int) -> dict[str, list[tuple[int, int]]]:
    """Which outputs of a fused projection are queries, keys and values, in order.

    Args:
        row: Says how it is laid out.
        rows: Its outputs.
        n_heads: Query heads.
        n_groups: Key/value groups.

    Returns:
        Ranges by kind.
    """
    d_head = rows // (n_heads + 2 * n_groups)
    counts = {"q": n_heads, "k": n_groups, "v": n_groups}
    if row.fused == "quarters":  # which need not be whole heads
        step = rows // 12
        return {
            kind: [(start, start + step) for start in range(place * step, rows, 3 * step)]
            for place, kind in enumerate("qvk")
        }
    runs = 1 if row.fused == "blocks" else n_groups
    ranges: dict[str, list[tuple[int, int]]] = {"q": [], "k": [], "v": []}
    start = 0
    for _ in range(runs):
        for kind, count in counts.items():
            stop = start + count // runs * d_head
            ranges[kind].append((start, stop))
            start = stop
    return ranges


def _oriented(module: nn.Module, row: Architecture) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return (weight.t() if row.conv1d else weight), bias


def linear_from(module: nn.Module, row: Architecture) -> PAHQLinear:
    """A `PAHQLinear` with the weights of a Linear or Conv1D."""
    weight, bias = _oriented(module, row)
    return PAHQLinear(weight.contiguous(), bias)
