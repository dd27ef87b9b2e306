"""Quantise a matrix some rows at a time, so that a large one needs no FP32 copy of its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ELEMENTS = 1 << 18  # at once
_ELEMENTS_ON_GPU = 1 << 24  # where every piece costs launches, and memory is fast


def _step(weight: Tensor) -> int:
    """Rows at once."""
    elements = _ELEMENTS if weight.device.type == "cpu" else _ELEMENTS_ON_GPU
    return max(1, elements // max(1, weight.shape[1]))


def by_rows(make: Callable[[Tensor], Any], weight: Tensor) -> Any:
    """A torchao tensor made of the tensors of a few rows each.

    Args:
        make: Quantises FP32 rows, each by itself. [rows, in] -> a torchao tensor
        weight: The matrix, in any floating dtype. [out, in]

    Returns:
        What `make` would return for the whole matrix.
    """
    rows, step = weight.shape[0], _step(weight)
    first = make(weight[:step].to(torch.float32))
    if step >= rows:
        return first
    names, attributes = first.__tensor_flatten__()
    whole: dict[str, Tensor] = {}
    for name in names:
        part = getattr(first, name)
        whole[name] = part.new_empty(rows, *part.shape[1:])
        whole[name][:step] = part
    for start in range(step, rows, step):
        some = make(weight[start : start + step].to(torch.float32))
        for name in names:
            whole[name][start : start + step] = getattr(some, name)
    return type(first).__tensor_unflatten__(whole, attributes, None, None)


def all_finite(weight: Tensor) -> bool:
    """Whether no value is NaN or infinite. [out, in]"""
    return all(bool(torch.isfinite(rows).all()) for rows in weight.split(_step(weight)))
