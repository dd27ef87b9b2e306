"""Low-precision weights against torchao's own dequantisation, and FP32 blocks read back from a source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

from pahq_hf.errors import ConfigError, ModelLoadError
from pahq_hf.precision.active_components import ActiveComponents
from pahq_hf.precision.formats.float8 import decode_e4m3
from pahq_hf.precision.formats.registry import quantize
from pahq_hf.precision.fp32.source import SourceBlock, WeightSource
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.products import resolve_compute
from pahq_hf.precision.weight_block import WeightBlock
from tests.helpers import MemorySource, ranges, weight_of
from tests.tiers import examples

FORMATS: tuple[str, ...] = ("fp8", "int8", "bf16")
ROWS, COLS = 12, 10
ALL = slice(None)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from +0."""
    assert a.dtype == b.dtype == torch.float32
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def torchao_values(weight: Tensor, fmt: str) -> Tensor:
    """What the format keeps of a weight, by torchao's own words."""
    if fmt == "bf16":
        return weight.to(torch.bfloat16).to(torch.float32)
    kind: Any = Float8Tensor if fmt == "fp8" else Int8Tensor
    values: Tensor = kind.from_hp(weight, granularity=PerRow()).dequantize(torch.float32)
    return values


# -- formats --------------------------------------------------------------------------------------


@given(
    scales=st.lists(st.floats(2**-100, 2**100, width=32), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
@examples(60)
def test_decode_e4m3_is_torchaos_dequantize_on_every_code(scales: list[float], seed: int) -> None:
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[torch.isfinite(codes.to(torch.float32))]
    assert len(codes) == 254
    shuffled = [codes[torch.randperm(254, generator=torch.Generator().manual_seed(seed))] for _ in scales]
    rows, scale = torch.stack(shuffled), torch.tensor(scales)[:, None]
    theirs = Float8Tensor(rows, scale, block_size=[1, 254], dtype=torch.float32).dequantize(torch.float32)
    assert same_bits(decode_e4m3(rows, scale), theirs)
    # The reference is what it should be, too.
    assert same_bits(theirs, rows.to(torch.float32) * scale)


@pytest.mark.parametrize("fmt", FORMATS)
@given(
    rows=ranges(ROWS),
    cols=ranges(COLS),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 3.0, 15.0]),
)
@examples(40)
def test_blocks_are_torchaos_dequantisation(
    fmt: str, rows: slice, cols: slice, seed: int, spread: float
) -> None:
    weight = weight_of(ROWS, COLS, seed, spread)
    expected = torchao_values(weight, fmt)
    low = quantize(weight, fmt)
    assert low.shape == (ROWS, COLS)
    assert same_bits(low.dense(slice(0, ROWS), slice(0, COLS)), expected)
    assert same_bits(low.dense(rows, cols), expected[rows, cols].contiguous())


@pytest.mark.parametrize(("fmt", "relative"), [("fp8", 2**-4), ("int8", 0.5 / 127), ("bf16", 2**-8)])
def test_rounding_error_is_the_formats(fmt: str, relative: float) -> None:
    """E4M3 keeps 3 bits of each number; int8 half a step of its row's largest; bf16 7 bits of each."""
    weight = weight_of(32, 64, seed=0, spread=2.0)
    error = (quantize(weight, fmt).dense(ALL, ALL) - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    bound = largest * relative * 1.001 if fmt == "int8" else weight.abs() * relative + largest * 2**-9 / 448
    assert (error <= bound).all()
    assert error.max() > 0  # something was rounded


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_dead_row_stays_zero(fmt: str) -> None:
    weight = weight_of(4, 6, seed=0)
    weight[2] = 0
    values = quantize(weight, fmt).dense(ALL, ALL)
    assert (values[2] == 0).all() and torch.isfinite(values).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_dense_is_a_private_copy(fmt: str) -> None:
    low = quantize(weight_of(4, 6, seed=0), fmt)
    before = low.dense(ALL, ALL)
    low.dense(ALL, ALL).zero_()
    assert same_bits(low.dense(ALL, ALL), before)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers_are_refused(fmt: str, bad: float) -> None:
    weight = weight_of(4, 6, seed=0)
    weight[3, 5] = bad
    with pytest.raises(ModelLoadError, match="NaN or infinity"):
        quantize(weight, fmt)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [("fp8", ROWS * COLS + 4 * ROWS), ("int8", ROWS * COLS + 4 * ROWS), ("bf16", 2 * ROWS * COLS)],
)
def test_nbytes_counts_codes_and_scales(fmt: str, expected: int) -> None:
    assert quantize(weight_of(ROWS, COLS, seed=0), fmt).nbytes == expected


# -- PAHQLinear -----------------------------------------------------------------------------------


@dataclass
class Lowered:
    """A projection kept low, and the two matrices it is made of."""

    linear: PAHQLinear
    full: Tensor
    low: Tensor
    bias: Tensor

    def mixed(self, *regions: WeightBlock) -> Tensor:
        weight = self.low.clone()
        for region in regions:
            weight[region.rows, region.cols] = self.full[region.rows, region.cols]
        return weight


def lowered(fmt: str = "fp8", seed: int = 0) -> Lowered:
    full = weight_of(ROWS, COLS, seed)
    bias = weight_of(1, ROWS, seed + 1)[0]
    linear = PAHQLinear(full.clone(), bias)
    linear.lower(fmt, SourceBlock(MemorySource({"w": full}), "w", False, ((0, ROWS),)))
    return Lowered(linear, full, torchao_values(full, fmt), bias)


def region_strategy() -> st.SearchStrategy[WeightBlock]:
    return st.builds(WeightBlock, ranges(ROWS), ranges(COLS))


def test_before_lowering_it_is_an_ordinary_linear() -> None:
    weight, bias, x = weight_of(ROWS, COLS, 0), weight_of(1, ROWS, 1)[0], weight_of(3, COLS, 2)
    linear = PAHQLinear(weight, bias)
    assert torch.equal(linear(x), F.linear(x, weight, bias))
    assert torch.equal(PAHQLinear(weight, None)(x), F.linear(x, weight))
    assert linear.nbytes == 4 * ROWS * COLS
    linear.raise_block(linear.whole)  # nothing to raise
    with linear.shared.mode.full_precision():
        assert torch.equal(linear.dense(), weight)
    assert linear.nbytes == 4 * ROWS * COLS


@pytest.mark.parametrize("fmt", FORMATS)
def test_lower_keeps_only_the_low_precision_weight(fmt: str) -> None:
    case = lowered(fmt)
    x = weight_of(3, COLS, seed=2)
    assert not torch.equal(case.low, case.full)
    assert same_bits(case.linear.dense(), case.low)
    assert torch.equal(case.linear(x), F.linear(x, case.low, case.bias))
    held = (*case.linear.named_parameters(), *case.linear.named_buffers())
    resident = [tensor for name, tensor in held if name != "bias"]
    assert len(resident) == 1 and case.linear.nbytes == quantize(case.full, fmt).nbytes
    with pytest.raises(ConfigError, match="already"):
        case.linear.lower(fmt, SourceBlock(MemorySource({}), "w", False, ()))


@given(
    fmt=st.sampled_from(FORMATS),
    regions=st.lists(region_strategy(), max_size=4),
    rows=ranges(ROWS),
    cols=ranges(COLS),
    seed=st.integers(0, 1000),
)
@examples(120)
def test_raised_regions_are_fp32_and_the_rest_is_low(
    fmt: str, regions: list[WeightBlock], rows: slice, cols: slice, seed: int
) -> None:
    """Any regions, overlapping or not, seen through any block."""
    case = lowered(fmt, seed)
    before = case.linear.nbytes
    for region in regions:
        case.linear.raise_block(region)
    expected = case.mixed(*regions)
    assert same_bits(case.linear.dense(), expected)
    assert same_bits(case.linear.dense(rows, cols).contiguous(), expected[rows, cols].contiguous())
    x = weight_of(3, COLS, seed)
    assert torch.equal(case.linear(x), F.linear(x, expected, case.bias))
    torch.testing.assert_close(case.linear.block(x, rows), F.linear(x, expected, case.bias)[:, rows])
    areas = [(r.rows.stop - r.rows.start) * (r.cols.stop - r.cols.start) for r in regions]
    assert case.linear.nbytes == before + 4 * sum(areas)
    case.linear.drop_raised()
    assert same_bits(case.linear.dense(), case.low)
    assert case.linear.nbytes == before


def test_block_without_bias() -> None:
    weight, x = weight_of(ROWS, COLS, 0), weight_of(3, COLS, 1)
    torch.testing.assert_close(PAHQLinear(weight, None).block(x, slice(4, 7)), x @ weight[4:7].T)


def test_full_precision_reads_everything_and_ends() -> None:
    case = lowered()
    region = WeightBlock(slice(2, 5), slice(0, COLS))
    case.linear.raise_block(region)
    before = case.linear.nbytes
    with pytest.raises(ZeroDivisionError), case.linear.shared.mode.full_precision():
        assert same_bits(case.linear.dense(), case.full)
        with case.linear.shared.mode.full_precision():
            pass
        assert same_bits(
            case.linear.dense(slice(1, 3), slice(4, 9)).contiguous(), case.full[1:3, 4:9].contiguous()
        )
        assert case.linear.nbytes == before  # streamed, not kept
        raise ZeroDivisionError
    assert same_bits(case.linear.dense(), case.mixed(region))


def test_full_precision_reads_bf16_checkpoints_as_fp32() -> None:
    stored = weight_of(ROWS, COLS, seed=0).to(torch.bfloat16)
    linear = PAHQLinear(stored.to(torch.float32), None)
    linear.lower("fp8", SourceBlock(MemorySource({"w": stored}), "w", False, ((0, ROWS),)))
    with linear.shared.mode.full_precision():
        assert same_bits(linear.dense(), stored.to(torch.float32))


@given(
    regions=st.lists(region_strategy(), min_size=1, max_size=3),
    steps=st.lists(
        st.sampled_from(["raise", "drop", "decode", "pack", "difference", "release", "full"]), max_size=12
    ),
    rows=ranges(ROWS),
    cols=ranges(COLS),
)
@examples(80)
def test_holding_a_decoded_weight_never_changes_a_value(
    regions: list[WeightBlock], steps: list[str], rows: slice, cols: slice
) -> None:
    """Whatever the order in which blocks are raised and dropped, and decoded or packed copies kept."""
    case, raised = lowered(), list[WeightBlock]()
    linear, x = case.linear, weight_of(3, COLS, seed=2)
    for number, step in enumerate(steps):
        if step == "raise":
            raised.append(regions[number % len(regions)])
            linear.raise_block(raised[-1])
        elif step == "drop":
            raised.clear()
            linear.drop_raised()
        elif step == "release":
            linear.release()
            assert linear.held_bytes == 0
        elif step == "full":
            with linear.shared.mode.full_precision():
                linear.hold_packed()  # not of the FP32 weight, in here or afterwards
                assert same_bits(linear.dense(), case.full)
                torch.testing.assert_close(linear(x), F.linear(x, case.full, case.bias))
        else:
            hold = {
                "decode": linear.hold_decoded,
                "pack": linear.hold_packed,
                "difference": linear.hold_difference,
            }
            hold[step]()
            assert linear.held_bytes >= 4 * ROWS * COLS
        expected = case.mixed(*raised)
        assert same_bits(linear.dense(rows, cols).contiguous(), expected[rows, cols].contiguous())
        torch.testing.assert_close(linear(x), F.linear(x, expected, case.bias))
        torch.testing.assert_close(linear.block(x, rows), F.linear(x, expected, case.bias)[:, rows])


def test_lowering_forgets_the_packed_weight() -> None:
    full, x = weight_of(ROWS, COLS, seed=0), weight_of(3, COLS, seed=2)
    linear = PAHQLinear(full.clone(), None)
    linear.hold_packed()
    torch.testing.assert_close(linear(x), F.linear(x, full))
    linear.lower("fp8", SourceBlock(MemorySource({"w": full}), "w", False, ((0, ROWS),)))
    torch.testing.assert_close(linear(x), F.linear(x, torchao_values(full, "fp8")))


# -- which component is raised --------------------------------------------------------------------


class BrokenSource(MemorySource):
    """Fails on the reads after the first few."""

    def __init__(self, tensors: dict[str, Tensor], reads: int) -> None:
        super().__init__(tensors)
        self.reads = reads

    def view(self, name: str, rows: slice, cols: slice) -> Tensor:
        self.reads -= 1
        if self.reads < 0:
            raise ModelLoadError("the file changed on disk")
        return super().view(name, rows, cols)


def control_over(source: WeightSource, weight: Tensor) -> ActiveComponents:
    """Two projections; component `x` owns rows of both, `y` the whole second one."""
    linears = [PAHQLinear(weight.clone(), None) for _ in range(2)]
    for linear in linears:
        linear.lower("int8", SourceBlock(source, "w", False, ((0, ROWS),)))
    rows = WeightBlock(slice(0, 3), slice(0, COLS))
    parts = {"x": [(linear, rows) for linear in linears], "y": [(linears[1], linears[1].whole)]}
    return ActiveComponents(parts, linears)


def test_activate_holds_exactly_the_components_named() -> None:
    weight = weight_of(ROWS, COLS, seed=0)
    control = control_over(MemorySource({"w": weight}), weight)
    low = control.nbytes
    assert control.is_low and control.nbytes_fp32 == 2 * 4 * ROWS * COLS and low < control.nbytes_fp32 / 2
    assert control.activate("x") and control.nbytes == low + 2 * 4 * 3 * COLS
    assert not control.activate("x")  # nothing changed
    assert control.activate("y") and control.nbytes == low + 4 * ROWS * COLS
    assert control.active == {"y"}
    assert control.activate("y", "x") and control.active == {"x", "y"}
    control.deactivate()
    assert control.nbytes == low and not control.active
    assert control.activate("x", "x") and control.nbytes == low + 2 * 4 * 3 * COLS


def test_activate_refuses_unknown_components_and_changes_nothing() -> None:
    weight = weight_of(ROWS, COLS, seed=0)
    control = control_over(MemorySource({"w": weight}), weight)
    control.activate("x")
    before = control.nbytes
    with pytest.raises(ConfigError, match="'z' is not a component"):
        control.activate("y", "z")
    assert control.active == {"x"} and control.nbytes == before


def test_activate_that_cannot_read_leaves_nothing_raised() -> None:
    weight = weight_of(ROWS, COLS, seed=0)
    control = control_over(BrokenSource({"w": weight}, reads=1), weight)
    low = control.nbytes
    with pytest.raises(ModelLoadError):
        control.activate("x")
    assert not control.active and control.nbytes == low


@pytest.mark.parametrize(
    ("amx", "amd", "chosen"), [(False, True, "bf16"), (True, False, "bf16"), (False, False, "fp32")]
)
def test_auto_takes_bf16_only_where_it_is_faster(
    amx: bool, amd: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some processors have BF16 instructions that are slower than FP32's."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"sse4a": amd}, raising=False)
    assert resolve_compute("auto", "fp8", torch.device("cpu")) == chosen
    assert resolve_compute("bf16", "fp8", torch.device("cpu")) == "bf16"  # asked for is asked for
