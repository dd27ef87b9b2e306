"""Every low-precision format against torchao's own dequantisation, block by block and to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

from pahq_hf.errors import ConfigError, ModelLoadError
from pahq_hf.precision.formats import by_rows
from pahq_hf.precision.formats.float8_e5m2 import decode_e5m2
from pahq_hf.precision.formats.mixed import lowered
from pahq_hf.precision.formats.registry import LowWeight, known_formats, quantize, stored_bytes
from pahq_hf.precision.weight_block import WeightBlock
from tests.helpers import ranges, weight_of
from tests.tiers import examples

pytestmark = pytest.mark.crossing

FORMATS: tuple[str, ...] = tuple(known_formats())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLS, GROUP = 9, 70, 32  # two whole groups of MX and a part of one
ALL = slice(None)

every_format = pytest.mark.parametrize("fmt", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equality that tells -0 from +0."""
    assert ours.dtype == theirs.dtype == torch.float32
    bits = [tensor.contiguous().view(torch.int32) for tensor in (ours, theirs)]
    return ours.shape == theirs.shape and torch.equal(*bits)


def padded(weight: Tensor) -> Tensor:
    """With zeros up to whole groups."""
    whole = torch.zeros(weight.shape[0], -(-weight.shape[1] // GROUP) * GROUP)
    whole[:, : weight.shape[1]] = weight
    return whole


def torchao_values(weight: Tensor, fmt: str) -> Tensor:
    """What a format keeps of a matrix, by torchao's own words."""
    weight = weight.float().contiguous()
    if fmt == "bf16":
        return weight.to(torch.bfloat16).to(torch.float32)
    if fmt == "mx":
        kept: Tensor = MXTensor.to_mx(padded(weight), torch.float8_e4m3fn, GROUP).dequantize(torch.float32)
        return kept[:, : weight.shape[1]]
    kind: Any = Int8Tensor if fmt == "int8" else Float8Tensor
    codes = {"float8_dtype": torch.float8_e5m2} if fmt == "fp8-e5m2" else {}
    values: Tensor = kind.from_hp(weight, granularity=PerRow(), **codes).dequantize(torch.float32)
    return values


def whole(low: LowWeight) -> Tensor:
    """All stored values. [out, in]"""
    return low.dense(slice(0, low.shape[0]), slice(0, low.shape[1]))


def test_an_unknown_format_is_named_with_those_there_are() -> None:
    weight = weight_of(ROWS, COLS, seed=0)
    for use in (lambda: quantize(weight, "fp4"), lambda: stored_bytes(ROWS, COLS, "fp4")):
        with pytest.raises(ConfigError, match=r"^format must be one of fp8, .*mx.*; got 'fp4'$"):
            use()


def test_naming_formats_loads_none_of_them() -> None:
    """`pahq info` plans memory without torchao."""
    code = (
        "import sys; from pahq_hf.precision.formats.registry import stored_bytes; "
        "print(stored_bytes(3, 64, 'mx'), "
        "[name for name in sys.modules if 'float8' in name and name.startswith('pahq_hf')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "198 []"


def inner(low: LowWeight) -> dict[str, Tensor]:
    """The plain tensors that a weight is stored in."""
    found: dict[str, Tensor] = {}
    module = cast(nn.Module, low)
    for name, tensor in chain[tuple[str, Any]](module.named_parameters(), module.named_buffers()):
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        found |= {f"{name}.{part}": getattr(tensor, part) for part in parts} or {name: tensor}
    return found


def assert_same_weight(ours: LowWeight, theirs: LowWeight) -> None:
    """Assert that two weights are stored in the same bits."""
    assert ours.shape == theirs.shape and ours.nbytes == theirs.nbytes
    pairs = inner(ours), inner(theirs)
    assert list(pairs[0]) == list(pairs[1])
    for mine, other in zip(*(pair.values() for pair in pairs), strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert torch.equal(mine.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    assert same_bits(whole(ours), whole(theirs))


# -- decoding ---------------------------------------------------------------------------------------


@given(
    scales=st.lists(st.floats(2**-100, 2**100, width=32), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
@examples(60)
def test_decode_e5m2_is_torchaos_dequantize_on_every_code(scales: list[float], seed: int) -> None:
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(torch.float8_e5m2)
    codes = codes[torch.isfinite(codes.to(torch.float32))]
    assert len(codes) == 256 - 8  # two infinities and six NaN
    generator = torch.Generator().manual_seed(seed)
    block = torch.stack([codes[torch.randperm(len(codes), generator=generator)] for _ in scales])
    scale = torch.tensor(scales)[:, None]
    theirs = Float8Tensor(block, scale, block_size=[1, len(codes)], dtype=torch.float32)
    assert same_bits(decode_e5m2(block, scale), theirs.dequantize(torch.float32))
    assert same_bits(decode_e5m2(block, scale), block.to(torch.float32) * scale)


@every_format
@given(
    rows=ranges(ROWS),
    cols=ranges(COLS),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 3.0, 15.0]),
    dtype=st.sampled_from(DTYPES[:2]),
    transposed=st.booleans(),
)
@examples(40)
def test_blocks_are_slices_of_torchaos_values(
    fmt: str, rows: slice, cols: slice, seed: int, spread: float, dtype: torch.dtype, transposed: bool
) -> None:
    """Whatever the checkpoint's dtype, and also of GPT-2's matrices, which lie there transposed."""
    weight = weight_of(ROWS, COLS, seed, spread).to(dtype)
    if transposed:
        weight = weight.t().contiguous().t()
    expected, low = torchao_values(weight, fmt), quantize(weight, fmt)
    assert low.shape == (ROWS, COLS)
    assert same_bits(whole(low), expected)
    assert same_bits(low.dense(rows, cols), expected[rows, cols])


@pytest.mark.parametrize("cols", [1, 31, 32, 33, 64, 95, 97])
def test_mx_of_any_width(cols: int) -> None:
    weight = weight_of(5, cols, seed=cols, spread=2.0)
    low, expected = quantize(weight, "mx"), torchao_values(weight, "mx")
    assert low.shape == (5, cols) and same_bits(whole(low), expected)
    for start in range(0, cols, 13):
        for stop in range(start + 1, cols + 1, 9):
            assert same_bits(low.dense(slice(1, 4), slice(start, stop)), expected[1:4, start:stop])


def test_mx_groups_scale_by_themselves() -> None:
    """Next to a huge group a small one keeps its precision; per row it would be gone."""
    weight = weight_of(4, 64, seed=0)
    weight[:, 32:] *= 1e-6
    for fmt, worst in (("mx", 0.13), ("fp8", 1.0)):
        error = (whole(quantize(weight, fmt)) - weight).abs()[:, 32:]
        relative = float((error / weight.abs()[:, 32:]).max())
        assert relative < worst if fmt == "mx" else relative == worst


HARD: dict[str, float] = {
    "zero": 0.0, "minus zero": -0.0, "smallest": 2.0**-149, "subnormal": 3e-40, "largest subnormal": 1.17e-38,
    "smallest normal": 2.0**-126, "tiny": 1e-30, "near one": 1 - 2.0**-24, "huge": 1e30, "largest": 3.4e38,
}  # fmt: skip


@pytest.mark.parametrize("fmt", ["mx", "bf16"])
@pytest.mark.parametrize("value", HARD.values(), ids=HARD)
@pytest.mark.parametrize("alone", [True, False])
def test_values_at_the_ends_of_fp32(fmt: str, value: float, alone: bool) -> None:
    """Groups of nothing else, and among ordinary numbers."""
    weight = torch.zeros(3, 40) if alone else weight_of(3, 40, seed=1)
    weight[1, 3], weight[2, 35], weight[0] = value, -value, value
    values = whole(quantize(weight, fmt))
    assert same_bits(values, torchao_values(weight, fmt))
    if value != 3.4e38 or fmt == "mx":  # BF16 rounds it to infinity
        assert torch.isfinite(values).all()
    if fmt == "mx" and value >= 1e-30 and alone:
        assert torch.allclose(values, weight, rtol=0.13, atol=0)


@every_format
def test_rows_of_zeros_stay_zeros(fmt: str) -> None:
    weight = weight_of(4, 50, seed=0)
    weight[2] = 0
    weight[3, 32:] = 0
    values = whole(quantize(weight, fmt))
    assert (values[2] == 0).all() and (values[3, 32:] == 0).all() and torch.isfinite(values).all()
    assert (values[0] != 0).any()


@pytest.mark.parametrize("fmt", ["fp8", "fp8-e5m2"])
def test_rows_of_zeros_are_zeros_to_torchao_too(fmt: str) -> None:
    """Other devices decode as it does."""
    low: Any = quantize(torch.zeros(2, 64), fmt)
    assert torch.equal(low.tensor.dequantize(), torch.zeros(2, 64))


# -- some rows at once ------------------------------------------------------------------------------


@every_format
@given(
    elements=st.integers(1, ROWS * COLS + 5),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(ROWS, COLS), (1, COLS), (ROWS, 2), (17, 5)]),
)
@examples(40)
def test_a_few_rows_at_once_are_all_rows_at_once(
    fmt: str, elements: int, seed: int, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = weight_of(*shape, seed, spread=2.0).to(dtype)
    expected = quantize(weight, fmt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_rows, "_ELEMENTS", elements)
        assert_same_weight(quantize(weight, fmt), expected)


@pytest.mark.parametrize(("elements", "largest"), [(1, 1), (COLS, 1), (3 * COLS + 1, 3), (10**6, ROWS)])
def test_no_more_rows_at_once_than_allowed(
    elements: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "_ELEMENTS", elements)
    seen: list[tuple[int, torch.dtype]] = []

    def make(some: Tensor) -> Any:
        seen.append((some.shape[0], some.dtype))
        return Int8Tensor.from_hp(some, granularity=PerRow())

    by_rows.by_rows(make, weight_of(ROWS, COLS, seed=0).to(torch.bfloat16))
    assert sum(count for count, _ in seen) == ROWS and max(seen)[0] == largest
    assert {dtype for _, dtype in seen} == {torch.float32}


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (4, 33), (ROWS - 1, COLS - 1)])
@pytest.mark.parametrize("elements", [1, 3 * COLS, 1 << 18])
def test_no_number_is_found_wherever_it_is(
    fmt: str, bad: float, place: tuple[int, int], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "_ELEMENTS", elements)
    weight = weight_of(ROWS, COLS, seed=0)
    quantize(weight, fmt)
    weight[place] = bad
    with pytest.raises(ModelLoadError, match="NaN or infinity"):
        quantize(weight, fmt)


# -- several formats in one matrix ------------------------------------------------------------------


@given(
    cuts=st.tuples(st.integers(1, ROWS - 1), st.integers(2, COLS - 2)),
    formats=st.lists(st.sampled_from(FORMATS), min_size=4, max_size=4),
    rows=ranges(ROWS),
    cols=ranges(COLS),
    seed=st.integers(0, 1000),
)
@examples(80)
def test_pieces_are_rounded_by_themselves(
    cuts: tuple[int, int], formats: list[str], rows: slice, cols: slice, seed: int
) -> None:
    weight = weight_of(ROWS, COLS, seed, spread=1.0)
    bands = [(slice(0, cut), slice(cut, size)) for cut, size in zip(cuts, (ROWS, COLS), strict=True)]
    regions = [WeightBlock(r, c) for r in bands[0] for c in bands[1]]
    low, expected, size = lowered(weight, list(zip(regions, formats, strict=True))), weight.clone(), 0
    for region, fmt in zip(regions, formats, strict=True):
        block = weight[region.rows, region.cols]
        expected[region.rows, region.cols] = torchao_values(block, fmt)
        size += quantize(block, fmt).nbytes
    assert low.shape == (ROWS, COLS) and low.nbytes == size
    assert same_bits(whole(low), expected)
    assert same_bits(low.dense(rows, cols), expected[rows, cols])


# -- size and error ---------------------------------------------------------------------------------

BYTES: dict[str, Callable[[int, int], int]] = {
    "fp8": lambda r, c: r * c + 4 * r,
    "fp8-e5m2": lambda r, c: r * c + 4 * r,
    "int8": lambda r, c: r * c + 4 * r,
    "bf16": lambda r, c: 2 * r * c,
    "mx": lambda r, c: r * (GROUP + 1) * -(-c // GROUP),
}


@every_format
@every_dtype
@pytest.mark.parametrize("elements", [5 * COLS, 1 << 18])
def test_nbytes_are_the_bytes_held(
    fmt: str, dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "_ELEMENTS", elements)
    low = quantize(weight_of(40, COLS, seed=0).to(dtype), fmt)
    # torchao keeps a byte of zero for each row of INT8: its zero point, which a symmetric format has not.
    held = [tensor for name, tensor in inner(low).items() if not name.endswith("zero_point")]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert low.nbytes == sum(storages.values()) == BYTES[fmt](40, COLS)


@every_format
@pytest.mark.parametrize("spread", [0.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_errors(fmt: str, spread: float, seed: int) -> None:
    """E4M3 keeps 3 bits of each number, E5M2 2 and BF16 7; INT8 half a step of its row's largest.

    MX rounds scales down to powers of two: what is then beyond E4M3's 448 is cut off, up to an eighth.
    """
    weight = weight_of(32, 96, seed, spread)
    error, size = (whole(quantize(weight, fmt)) - weight).abs(), weight.abs()
    largest = size.amax(1, keepdim=True)
    groups = size.unflatten(1, (-1, GROUP)).amax(-1).repeat_interleave(GROUP, dim=1)
    bound = {  # the second term: half of the smallest subnormal
        "fp8": size * 2**-4 + largest * 2**-10 / 448,
        "fp8-e5m2": size * 2**-3 + largest * 2**-17 / 57344,
        "int8": largest * 0.5 / 127,
        "bf16": size * 2**-8,
        "mx": torch.where(size > groups * 0.87, size * 2**-3, size * 2**-4) + groups * 2**-10 / 256,
    }[fmt]
    assert (error <= 1.001 * bound).all()
    typical = {"fp8": 2**-5.5, "fp8-e5m2": 2**-4.5, "int8": 2**-7, "bf16": 2**-9.5, "mx": 2**-5.3}[fmt]
    relative = float(error.norm() / weight.norm())
    assert typical / 2 < relative < 2 * typical
