"""Products in FP8, on the CPU's `torch._scaled_mm`, and which compute and margin a device gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pahq_hf import ACDCConfig, PAHQConfig
from pahq_hf.precision import products
from pahq_hf.precision.formats.float8 import DynamicFloat8Product, Float8Weight
from pahq_hf.precision.fp32.source import SourceBlock
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.products import resolve_compute
from pahq_hf.search.acdc_run import with_margin
from tests.helpers import MemorySource


def everything(weight: Tensor) -> tuple[slice, slice]:
    return slice(0, weight.shape[0]), slice(0, weight.shape[1])


def low(rows: int, cols: int) -> tuple[PAHQLinear, Tensor]:
    """A projection in FP8 whose products of differences are asked for in FP8, and its stored values."""
    weight = torch.randn(rows, cols)
    linear = PAHQLinear(weight, None)
    linear.lower(
        "fp8", SourceBlock(MemorySource({"w": weight}), "w", False, ((0, rows),)), torch.float8_e4m3fn
    )
    return linear, linear.dense()


def error(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).norm() / exact.norm())


@pytest.mark.parametrize("leading", [(7,), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_the_fp32_one_but_for_rounding(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    linear, weight = low(48, 64)
    x = (torch.randn(*leading, 64) * 1e-3).to(dtype)
    product = linear.difference(*everything(weight))
    assert isinstance(product, DynamicFloat8Product)
    y = product(x)
    assert y.dtype == dtype and y.shape == (*leading, 48)
    assert error(y.float(), x.float() @ weight.t()) < 2**-4  # E4M3 rounds by up to that


def test_rows_of_x_are_scaled_each_by_itself() -> None:
    linear, weight = low(32, 32)
    x = torch.randn(4, 32) * torch.tensor([1e-9, 1e-3, 1.0, 1e6])[:, None]
    y = linear.difference(*everything(weight))(x)
    for row, exact in zip(y, x @ weight.t(), strict=True):
        assert error(row, exact) < 2**-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_a_difference_gives_zeros(dtype: torch.dtype) -> None:
    linear, weight = low(32, 16)
    x = torch.randn(3, 16)
    x[1] = 0
    y = linear.difference(*everything(weight))(x.to(dtype))
    assert torch.isfinite(y).all() and not y[1].any() and y[0].any()


def test_a_row_of_zeros_in_the_weight_gives_zeros() -> None:
    weight = torch.randn(16, 16)
    weight[3] = 0
    product = Float8Weight(weight).dynamic(*everything(weight))
    assert product is not None
    y = product(torch.randn(2, 16))
    assert torch.isfinite(y).all() and not y[:, 3].any()


def test_nan_stays_nan() -> None:
    linear, weight = low(16, 16)
    x = torch.zeros(2, 16)
    x[0, 3] = torch.nan
    y = linear.difference(*everything(weight))(x)
    assert torch.isnan(y[0]).all() and not y[1].any()


@pytest.mark.parametrize(("rows", "cols"), [(72, 64), (64, 40), (10, 6)])
def test_sizes_no_kernel_takes_are_multiplied_in_bf16(rows: int, cols: int) -> None:
    linear, weight = low(rows, cols)
    product = linear.difference(*everything(weight))
    assert product.dtype == torch.bfloat16 and not isinstance(product, DynamicFloat8Product)
    x = torch.randn(5, cols)
    assert error(product(x), x @ weight.t()) < 2**-7  # BF16's: better than FP8's


def test_a_head_within_a_larger_weight_is_multiplied_in_fp8() -> None:
    linear, weight = low(96, 64)
    product = linear.difference(slice(32, 48), slice(0, 64))
    assert isinstance(product, DynamicFloat8Product)
    x = torch.randn(5, 64)
    assert error(product(x), x @ weight[32:48].t()) < 2**-4


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_auto_is_bf16_on_every_gpu_that_has_it(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(products, "native_bf16", lambda device: True)
    device = torch.device("cuda", 0)
    for fmt in ("fp8", "int8"):
        assert resolve_compute("auto", fmt, device) == "bf16"
    if capability >= (8, 9):
        assert resolve_compute("fp8", "fp8", device) == "fp8"


@pytest.mark.parametrize(
    ("config", "margin"),
    [
        (PAHQConfig(compute="bf16"), 0.2),
        (PAHQConfig(compute="fp32", format="int8"), 0.2),
        (PAHQConfig(compute="fp8"), 0.5),
        (PAHQConfig(compute="fp8", format="int8", policy={"m*": "fp8"}), 0.5),
    ],
)
def test_the_margin_follows_the_error_of_the_products(config: PAHQConfig, margin: float) -> None:
    """Twice the 99th percentile: FP8 products have a quarter, all others a tenth at most."""
    assert with_margin(ACDCConfig(), config).margin == margin
    assert with_margin(ACDCConfig(margin=0.1), config).margin == 0.1  # given is given
