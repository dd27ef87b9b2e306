"""Quantise a matrix some rows at a time, so that a large one needs no FP32 copy of its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ELEMENTS = 1 << 18  # at once


def by_rows(make: Callable[[Tensor], Any], weight: Tensor) -> Any:
    """A torchao tensor made of the tensors of a few rows each.

    Args:
        make: Quantises FP32 rows, each by itself. [rows, in] -> a torchao tensor
        weight: The matrix, in any floating dtype. [out, in]

    Returns:
        What `make` would return for the whole matrix.
    """
    rows, cols = weight.shape
    step = max(1, _ELEMENTS // max(1, cols))
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
    step = max(1, _ELEMENTS // max(1, weight.shape[1]))
    return all(bool(torch.isfinite(rows).all()) for rows in weight.split(step))
