"""What a GPU does not let pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class MixedDevices(RuntimeError):
    """Tensors of two devices met in one operator."""


class AnyOrder(RuntimeError):
    """Floats would be added up in whatever order they arrive: results differ from run to run."""


# Copies may cross; so may what makes a tensor like another.
_CROSSING = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Kernels that do not even take a number from the CPU.
_STRICT = {
    "mm", "bmm", "addmm", "linear", "cat", "stack", "gather", "index_select", "embedding", "scatter",
    "_scaled_mm",
}  # fmt: skip
_TILE = 16
# Kernels that add by atomics, or in an order of their own; an accumulating `index_put_` sorts.
_ATOMIC = {
    "index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
    "index_reduce", "index_reduce_", "put_",
}  # fmt: skip


def check(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], plain: Sequence[Tensor]) -> None:
    """Raise what a GPU would.

    Args:
        func: The operator.
        name: Its name.
        args: What it is given; at least one tensor of the device is among it, or it makes one.
        kwargs: The same by name.
        plain: The tensors of the CPU among it.
    """
    if func.namespace in ("mkldnn", "mkl", "onednn") or "mkldnn" in name:
        raise MixedDevices(f"{func}: an operator of the CPU got a tensor of the device")
    if name == "_scaled_mm":
        _check_scaled(args[0], args[1])
    if name in _ATOMIC and args[0].is_floating_point():
        raise AnyOrder(f"{func}: sums in any order")
    if not plain or name in _CROSSING or name.endswith("_like") or name.startswith("new_"):
        return
    if name in _INDEXING:
        _check_index(func, name, args, plain)
        return
    for tensor in plain:
        if tensor.dim() > 0 or name in _STRICT:
            raise MixedDevices(
                f"{func}: a CPU tensor of shape {tuple(tensor.shape)} among those of the device"
            )
    for tensor in written(func, args, kwargs):
        if any(tensor is other for other in plain):
            raise MixedDevices(f"{func}: writes tensors of the device into one of the CPU")


def _check_index(func: Any, name: str, args: Sequence[Any], plain: Sequence[Tensor]) -> None:
    """A list of indices may come from the CPU, what is indexed and put may not."""
    if any(args[0] is tensor for tensor in plain):
        raise MixedDevices(f"{func}: indices of the device into a tensor of the CPU")
    puts = name not in ("index", "_unsafe_index")
    if puts and len(args) > 2 and args[2].dim() > 0 and any(args[2] is tensor for tensor in plain):
        raise MixedDevices(f"{func}: values of the CPU put into a tensor of the device")


def _check_scaled(a: Tensor, b: Tensor) -> None:
    """What cuBLASLt asks of FP8 matrices."""
    if a.shape[1] % _TILE or b.shape[0] % _TILE or b.shape[1] % _TILE:
        raise RuntimeError(f"_scaled_mm: sizes must be multiples of 16: {tuple(a.shape)} x {tuple(b.shape)}")
    if a.stride(1) != 1 or b.stride(0) != 1:
        raise RuntimeError(
            f"_scaled_mm: wants rows of the first and columns of the second: {a.stride()} {b.stride()}"
        )


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into, in the order of its arguments."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = kwargs.get(argument.name, args[number] if number < len(args) else None)
        if isinstance(given, torch.Tensor):
            found.append(given)
    return found
