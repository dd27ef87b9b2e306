"""Sums by index that repeat to the bit."""

from __future__ import annotations

from torch import Tensor


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
