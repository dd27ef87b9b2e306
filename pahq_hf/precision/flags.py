"""PyTorch's switches that let FP32 products be something else: off while we compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_EXACT = ("ieee", "none")  # "none": nothing is set, which is IEEE's FP32 too


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, FP32 products are FP32 and sums of BF16 products are FP32; also a decorator.

    TF32 has 10 bits of FP32's 23, and a score is a difference of two metrics that agree in most of them;
    autocast would round everything. The switches are the process's: the caller's are put back on leaving.
    """
    with ExitStack() as undo:
        undo.callback(_pin_cuda())
        undo.callback(_pin_cpu())
        undo.callback(_pin_reductions())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                undo.enter_context(torch.autocast(kind, enabled=False))
        yield


def product_flags() -> dict[str, Any]:
    """How the GPU multiplies now: what a run's facts say about it."""
    matmul: Any = torch.backends.cuda.matmul
    return {
        "fp32_matmul": "ieee" if matmul.fp32_precision in _EXACT else matmul.fp32_precision,
        "bf16_reduced_precision_reduction": bool(matmul.allow_bf16_reduced_precision_reduction),
    }


def _pin_cuda() -> Callable[[], None]:
    """Without TF32. PyTorch has an old and a new switch for it, and fails wherever they disagree."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before in _EXACT:
        return _nothing
    try:
        name = torch.get_float32_matmul_precision()
        old = bool(matmul.allow_tf32)
    except RuntimeError:  # set by the new switch alone
        old = False
    if not old:
        matmul.fp32_precision = "ieee"
        return lambda: setattr(matmul, "fp32_precision", before)
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    beside = cpu.fp32_precision
    matmul.allow_tf32 = False

    def put_back() -> None:
        torch.set_float32_matmul_precision(name)  # also sets the CPU's
        cpu.fp32_precision = beside

    return put_back


def _pin_cpu() -> Callable[[], None]:
    """Without oneDNN's BF16 in place of FP32."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if before in _EXACT:
        return _nothing
    matmul.fp32_precision = "ieee"
    return lambda: setattr(matmul, "fp32_precision", before)


def _pin_reductions() -> Callable[[], None]:
    """Where a BF16 product is cut along its sum, the parts are added in FP32."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    if not before:
        return _nothing
    matmul.allow_bf16_reduced_precision_reduction = False
    return lambda: setattr(matmul, "allow_bf16_reduced_precision_reduction", before)


def _nothing() -> None:
    pass
