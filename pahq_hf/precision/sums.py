"""Sums by index that repeat to the bit."""

from __future__ import annotations

from torch import Tensor

from pahq_hf.precision.backward import is_differentiated


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`total[index[i]] += rows[i]`, in place, in an order that does not change from run to run.

    On a GPU `index_add_` adds by atomics, in whatever order they arrive; accumulating `index_put_` sorts.

    Args:
        total: Where rows are added. [n, ...]
        index: Where each goes; may repeat. [m]
        rows: What is added. [m, ...]

    Returns:
        `total`.
    """
    if total.device.type == "cpu":
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)


def take_tokens(values: Tensor, index: Tensor) -> Tensor:
    """Some tokens' values, whose gradients are added up in an order that does not change from run to run.

    On a GPU those of `index_select` are added by atomics, as `index_add_` adds.

    Args:
        values: [..., tokens, d]
        index: Which tokens; may repeat. [n]

    Returns:
        [..., n, d]
    """
    if values.device.type == "cpu" or not is_differentiated(values):
        return values.index_select(-2, index)
    return values[..., index, :]
