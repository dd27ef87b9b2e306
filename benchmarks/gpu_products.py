"""Matrix products and transfers on a card: how exact, how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pahq_hf.errors import ConfigError
from pahq_hf.precision.formats.float8 import Float8Weight
from pahq_hf.precision.products import Product, resolve_compute

_WIDTH, _HIDDEN = 4096, 14336  # of an 8B Llama


def machine(device: torch.device) -> dict[str, Any]:
    """What the caller's settings are, and whether an FP32 product is one."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(512, _WIDTH, device=device, generator=generator)
    b = torch.randn(512, _WIDTH, device=device, generator=generator)
    found: dict[str, Any] = {
        "fp32_product_error": _error(a @ b.t(), a.double() @ b.double().t()),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    for name in ("fp32", "pahq"):
        compute = "fp32" if name == "fp32" else resolve_compute("auto", "fp8", device)
        found[f"auto_compute_{name}"] = compute
    return found


def products(device: torch.device) -> dict[str, Any]:
    """Products of our own in FP32 and BF16, also where the caller allows TF32: error and milliseconds."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(_WIDTH, _WIDTH, device=device, generator=generator) / _WIDTH**0.5
    rows = []
    for tokens in (16, 160, 3328) if device.type == "cuda" else (16,):
        x = torch.randn(tokens, _WIDTH, device=device, generator=generator)
        exact = x.double() @ weight.double().t()
        for dtype in (torch.float32, torch.bfloat16):
            product = Product(weight.to(dtype))
            name = str(dtype).removeprefix("torch.")
            rows.append(
                {
                    "dtype": name,
                    "tokens": tokens,
                    "error": _error(product(x), exact),
                    "ms": milliseconds(lambda product=product, x=x: product.raw(x), device),
                }
            )
    return {"products": rows}


def fp8(device: torch.device) -> dict[str, Any]:
    """The dynamic FP8 product: rows of zeros, sizes that are no multiples of 16, error, milliseconds."""
    try:
        resolve_compute("fp8", "fp8", device)
    except ConfigError as error:
        return {"refused": str(error)}
    generator = torch.Generator(device).manual_seed(0)
    weight = Float8Weight(torch.randn(_WIDTH, _WIDTH, device=device, generator=generator))
    x = torch.randn(3328, _WIDTH, device=device, generator=generator) * 1e-3
    every = (slice(0, _WIDTH), slice(0, _WIDTH))
    zeros = x.clone()
    zeros[5] = 0
    rows = []
    for out, into in ((4096, 4096), (72, 4096), (4096, 40), (128, 4096), (9, 23)):
        block = (slice(0, out), slice(0, into))
        exact = x[:, :into].double() @ weight.dense(*block).double().t()
        product = weight.dynamic(*block)
        if product is None:  # no kernel for these sizes: the search computes them in BF16
            rows.append({"out": out, "in": into, "kernel": False})
            continue
        y = product(x[:, :into])
        rows.append({"out": out, "in": into, "kernel": True, "error": _error(y, exact), "finite": _finite(y)})
    products = {
        "fp8": weight.dynamic(*every),
        "bf16": Product(weight.dense(*every).bfloat16()),
        "fp32": Product(weight.dense(*every)),
    }
    speed = []
    for tokens in (16, 160, 3328):
        some = x[:tokens]
        times = {
            name: milliseconds(lambda product=product, some=some: product.raw(some), device)
            for name, product in products.items()
        }
        speed.append({"tokens": tokens} | {f"ms_{name}": value for name, value in times.items()})
    zero_row = products["fp8"](zeros)
    return {"zero_row_finite": _finite(zero_row), "blocks": rows, "speed": speed}


def transfers(device: torch.device) -> dict[str, Any]:
    """How fast a weight of an 8B Llama's MLP reaches the card."""
    shape = (_HIDDEN, _WIDTH) if device.type == "cuda" else (64, 64)
    pin = device.type == "cuda"
    sources = {
        "pageable fp32": torch.zeros(shape),
        "pageable bf16": torch.zeros(shape, dtype=torch.bfloat16),
        "pinned bf16": torch.zeros(shape, dtype=torch.bfloat16, pin_memory=pin),
    }
    rows = []
    for name, tensor in sources.items():
        ms = milliseconds(lambda tensor=tensor: tensor.to(device, copy=True), device, repeats=5)
        rows.append({"source": name, "GB_per_s": tensor.nbytes / 1e6 / ms, "ms": ms})
    half = sources["pageable bf16"]
    ms = milliseconds(lambda: half.to(device, torch.float32), device, repeats=5)
    rows.append({"source": "pageable bf16, FP32 on arrival", "GB_per_s": half.nbytes / 1e6 / ms, "ms": ms})
    return {"transfers": rows}


def milliseconds(function: Callable[[], Tensor], device: torch.device, repeats: int = 20) -> float:
    """Mean milliseconds of a call, two not counted."""
    for _ in range(2):
        function()
    settle(device)
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    settle(device)
    return 1000 * (time.perf_counter() - started) / repeats


def settle(device: torch.device) -> None:
    """Wait until the card has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _error(ours: Tensor, exact: Tensor) -> float:
    """Relative error by norms."""
    return float((ours.double() - exact).norm() / exact.norm())


def _finite(y: Tensor) -> bool:
    return bool(torch.isfinite(y).all())
