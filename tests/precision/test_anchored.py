"""Anchored arithmetic: low-precision weights that only ever multiply differences.

`y = y0 + W_low (x - x0)` for linear maps; and what is never low, the logarithm of a sum over the vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pahq_hf.engine.sparse.vocabulary import Vocabulary
from pahq_hf.precision.anchors import Anchor, Origin
from pahq_hf.precision.formats.registry import quantize
from pahq_hf.precision.fp32.source import SourceBlock
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.weight_block import WeightBlock
from tests.helpers import MemorySource, ranges, weight_of
from tests.tiers import examples

pytestmark = pytest.mark.crossing

FORMATS: tuple[str, ...] = ("fp8", "int8", "bf16")
COMPUTES = (torch.float32, torch.bfloat16)
ROWS, COLS, SIZE = 12, 10, 4
# BF16 keeps 8 bits: the weight, the difference and the result are each rounded by 2^-8 at most.
BF16 = 3 * 2**-8 * 1.02


@dataclass
class Case:
    """A projection kept low, the two matrices it is made of, and an anchor."""

    linear: PAHQLinear
    full: Tensor
    low: Tensor
    bias: Tensor | None
    anchor: Anchor
    compute: torch.dtype

    def mixed(self, *regions: WeightBlock) -> Tensor:
        """The weight with FP32 blocks."""
        weight = self.low.clone()
        for region in regions:
            weight[region.rows, region.cols] = self.full[region.rows, region.cols]
        return weight

    def anchored(self, anchor: Anchor | None = None) -> AbstractContextManager[None]:
        """Inside, products start from the anchor, or another one."""
        return self.linear.shared.mode.anchored({self.linear: anchor or self.anchor})

    def at(self, x: Tensor) -> Tensor:
        """The anchored product."""
        with self.anchored():
            return self.linear(x)  # type: ignore[no-any-return]


def case_of(
    fmt: str = "fp8",
    compute: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    seed: int = 0,
    size: int | None = None,
    repeat: int = 1,
) -> Case:
    """Anchored at a random input of five tokens; of `blocks` when a size is given."""
    full = weight_of(ROWS, COLS, seed)
    b = weight_of(1, ROWS, seed + 1)[0] if bias else None
    linear = PAHQLinear(full.clone(), b)
    linear.lower(fmt, SourceBlock(MemorySource({"w": full}), "w", False, ((0, ROWS),)), compute)
    low = quantize(full, fmt).dense(slice(0, ROWS), slice(0, COLS))
    mode = linear.shared.mode
    with mode.full_precision(), mode.recording([linear]) as noted:
        if size is None:
            linear(weight_of(5, COLS, seed + 2))
        else:
            linear.blocks(weight_of(5 * repeat * ROWS // size, COLS, seed + 2).unflatten(0, (-1, 5)), size)
    return Case(linear, full, low, b, noted[linear][0], compute)


def step_from(x0: Tensor, scale: float, seed: int) -> Tensor:
    """An input at about this distance. The difference is what FP32 makes of it."""
    return x0 + scale * torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))


def assert_difference(change: Tensor, moved: Tensor, weight: Tensor, y0: Tensor, *, bf16: bool) -> None:
    """Assert `change = W moved`, up to the rounding of the sum `y0 + change` and of the products."""
    expected = moved.double() @ weight.double().T
    size = moved.double().abs() @ weight.double().abs().T
    bound = 1e-6 * (1 + y0.abs() + size) + (BF16 * size if bf16 else 0)
    assert ((change - expected).abs() <= bound).all()
    if change.numel() > 30:  # on the whole the relative error of the difference is below a hundredth
        rounding = 1e-6 * (y0.norm() + change.numel() ** 0.5)
        assert (change - expected).norm() <= (1e-2 if bf16 else 1e-6) * expected.norm() + rounding


# -- linear maps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compute", COMPUTES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_at_the_anchor_nothing_is_rounded(fmt: str, compute: torch.dtype, bias: bool) -> None:
    """y0 comes back to the bit, and y0 is what the FP32 weight makes of x0."""
    case = case_of(fmt, compute, bias=bias)
    x0, y0 = case.anchor.x, case.anchor.y
    torch.testing.assert_close(y0, F.linear(x0, case.full, case.bias), atol=1e-6, rtol=1e-6)
    assert torch.equal(case.at(x0), y0)
    assert torch.equal(case.at(x0.clone()), y0)
    batch = torch.stack([x0, x0 + 1.0, x0])  # several circuits side by side
    moved = case.at(batch)
    assert torch.equal(moved[0], y0) and torch.equal(moved[2], y0) and not torch.equal(moved[1], y0)
    assert not torch.equal(F.linear(x0, case.low, case.bias), y0)  # what no anchor would give


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("repeat", [1, 2], ids=["one each", "shared"])
@pytest.mark.parametrize("compute", COMPUTES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_runs_of_outputs_have_anchors_of_their_own(
    fmt: str, compute: torch.dtype, repeat: int, bias: bool
) -> None:
    case = case_of(fmt, compute, bias=bias, size=SIZE, repeat=repeat)
    x0, y0 = case.anchor.x, case.anchor.y
    runs = ROWS // SIZE
    assert y0.shape == (runs * repeat, 5, SIZE)
    full = case.full.unflatten(0, (runs, SIZE)).repeat_interleave(repeat, dim=0)
    low = case.low.unflatten(0, (runs, SIZE)).repeat_interleave(repeat, dim=0)
    added = torch.zeros(ROWS) if case.bias is None else case.bias
    added = added.unflatten(0, (runs, SIZE)).repeat_interleave(repeat, dim=0)
    for run in range(runs * repeat):
        expected = F.linear(x0[run], full[run], added[run])
        torch.testing.assert_close(y0[run], expected, atol=1e-6, rtol=1e-6)
    with case.anchored():
        assert torch.equal(case.linear.blocks(x0, SIZE), y0)
        for scale in (1.0, 1e-3):
            x = step_from(x0, scale, seed=3)
            y = case.linear.blocks(x, SIZE)
            for run in range(runs * repeat):
                moved = x[run].double() - x0[run]
                assert_difference(
                    y[run].double() - y0[run], moved, low[run], y0[run], bf16=compute == torch.bfloat16
                )


@given(
    fmt=st.sampled_from(FORMATS),
    compute=st.sampled_from(COMPUTES),
    bias=st.booleans(),
    scale=st.sampled_from([1e-5, 1e-3, 1e-1, 1.0, 30.0]),
    circuits=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(100)
def test_low_precision_multiplies_only_the_difference(
    fmt: str, compute: torch.dtype, bias: bool, scale: float, circuits: int, seed: int
) -> None:
    """Whatever its size: so the error is relative to it, and vanishes with it."""
    case = case_of(fmt, compute, bias=bias, seed=seed)
    x0, y0 = case.anchor.x, case.anchor.y
    x = step_from(x0.expand(circuits, -1, -1), scale, seed)
    y = case.at(x)
    assert y.shape == (circuits, 5, ROWS) and y.dtype == torch.float32
    moved, bf16 = x.double() - x0, compute == torch.bfloat16
    assert_difference(y.double() - y0, moved, case.low, y0, bf16=bf16)
    with case.anchored(Anchor(case.anchor.origin, None)):  # the difference alone
        alone = case.linear(x).double()
        assert_difference(alone / scale, moved / scale, case.low, torch.zeros(1), bf16=bf16)
        assert not case.linear(x0).any()
    # The format's error is there, in proportion: without it this would be another test of FP32.
    if scale >= 1e-3 and fmt != "bf16":
        exact = F.linear(x, case.full, case.bias)
        size = float((moved.abs() @ case.full.double().abs().T).max())
        assert 1e-5 * size < float((y - exact).abs().max()) < 0.05 * size + 1e-6


def test_without_an_anchor_small_differences_would_drown() -> None:
    """The bound above is no formality: plain BF16 products miss it by orders of magnitude."""
    case = case_of("bf16", torch.bfloat16)
    x0, y0 = case.anchor.x, case.anchor.y
    x = step_from(x0, 1e-3, seed=4)
    exact = (x.double() - x0) @ case.full.double().T
    plain = F.linear(x.bfloat16(), case.low.bfloat16()).double() + case.bias - y0.double()
    anchored = case.at(x).double() - y0
    assert (plain - exact).norm() > 0.5 * exact.norm()
    assert (anchored - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compute", COMPUTES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_raised_map_is_the_fp32_map(fmt: str, compute: torch.dtype, bias: bool) -> None:
    case = case_of(fmt, compute, bias=bias)
    x = step_from(case.anchor.x, 3.0, seed=5)
    exact = F.linear(x, case.full, case.bias)
    before = case.at(x)  # its packed products must not outlive the change
    assert not torch.allclose(before, exact, atol=1e-4)
    case.linear.raise_block(case.linear.whole)
    torch.testing.assert_close(case.at(x), exact, atol=1e-5, rtol=1e-5)
    case.linear.drop_raised()
    assert torch.equal(case.at(x), before)
    rows = WeightBlock(slice(4, 8), slice(0, COLS))
    case.linear.raise_block(rows)
    torch.testing.assert_close(case.at(x)[:, 4:8], exact[:, 4:8], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(case.at(x)[:, :4], exact[:, :4], atol=1e-4)
    with case.linear.shared.mode.full_precision():
        torch.testing.assert_close(case.at(x), exact, atol=1e-5, rtol=1e-5)


@given(
    fmt=st.sampled_from(FORMATS),
    compute=st.sampled_from(COMPUTES),
    regions=st.lists(st.builds(WeightBlock, ranges(ROWS), ranges(COLS)), min_size=1, max_size=3),
    steps=st.lists(st.sampled_from(["raise", "drop", "hold", "decode", "release", "full"]), max_size=10),
    rows=ranges(ROWS),
    cols=ranges(COLS),
)
@examples(80)
def test_whatever_is_raised_or_held_the_difference_meets_the_effective_weight(
    fmt: str,
    compute: torch.dtype,
    regions: list[WeightBlock],
    steps: list[str],
    rows: slice,
    cols: slice,
) -> None:
    case, raised = case_of(fmt, compute), list[WeightBlock]()
    linear, x0, y0 = case.linear, case.anchor.x, case.anchor.y
    x = step_from(x0, 1.0, seed=6)
    moved = x.double() - x0
    for number, step in enumerate(["start", *steps]):
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
                linear.hold_difference()  # must not outlive full precision
                assert_difference(case.at(x).double() - y0, moved, case.full, y0, bf16=False)
        elif step != "start":
            hold = linear.hold_difference if step == "hold" else linear.hold_decoded
            hold()
            assert linear.held_bytes > 0
        weight = case.mixed(*raised)
        bf16 = compute == torch.bfloat16
        assert_difference(case.at(x).double() - y0, moved, weight, y0, bf16=bf16 and not linear.is_raised)
        assert torch.equal(case.at(x0), y0)
        block = WeightBlock(rows, cols)
        part = linear.difference(rows, cols)(moved[:, cols].float()).double()
        assert_difference(
            part,
            moved[:, cols],
            weight[rows, cols],
            torch.zeros(1),
            bf16=bf16 and not linear.is_raised_in(block),
        )
        torch.testing.assert_close(linear(x), F.linear(x, weight, case.bias))  # without an anchor


def test_maps_that_share_an_input_share_its_origin() -> None:
    """As a gate and an up projection do; whichever asks first, and for whichever input."""
    x0 = weight_of(5, COLS, 0)
    cases = [case_of("int8", compute, seed=10 * i) for i, compute in enumerate(COMPUTES)]
    for case in cases:  # both now start from one x0
        mode = case.linear.shared.mode
        with mode.full_precision(), mode.recording([case.linear]) as noted:
            case.linear(x0)
        case.anchor = noted[case.linear][0]
    origin = Origin(x0)
    shared = [Anchor(origin, case.anchor.y) for case in cases]
    inputs = [step_from(x0, 1.0, seed) for seed in range(3)]
    for number in (0, 1, 1, 2, 0, 2):
        for case, anchor in zip(cases, shared, strict=True):
            with case.anchored(anchor):
                assert torch.equal(case.linear(inputs[number]), case.at(inputs[number]))


@pytest.mark.parametrize("compute", COMPUTES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_made_of_an_anchored_product_in_place_has_a_gradient(fmt: str, compute: torch.dtype) -> None:
    """Falcon's blocks add the attention to what their MLP gives, in place. [batch, pos, in]"""
    case = case_of(fmt, compute)
    x = step_from(case.anchor.x, 0.1, seed=3).expand(2, -1, -1).clone().requires_grad_()
    weights = weight_of(10, ROWS, seed=4).view(2, 5, ROWS)
    with case.anchored():
        y = case.linear(x)
        y += 2 * y.detach()
        (gradient,) = torch.autograd.grad(y, x, weights)
    torch.testing.assert_close(gradient, weights @ case.low, atol=1e-5, rtol=1e-5)


def test_recording_notes_every_product_and_ends() -> None:
    case = case_of()
    x, z = weight_of(3, COLS, 7), weight_of(6, COLS, 8).unflatten(0, (3, 2))
    mode = case.linear.shared.mode
    with mode.recording([case.linear]) as outer:
        y = case.linear(x)
        with mode.recording([case.linear]) as inner:
            case.linear.blocks(z, SIZE)
        case.linear(x + 1)
    case.linear(x + 2)
    assert [note.x.shape for note in inner[case.linear]] == [(3, 2, COLS)]
    assert [note.x[0, 0].item() for note in outer[case.linear]] == [x[0, 0].item(), (x + 1)[0, 0].item()]
    assert torch.equal(outer[case.linear][0].y, y)
    with pytest.raises(ZeroDivisionError), case.anchored():
        raise ZeroDivisionError
    assert torch.equal(case.linear(x), y)  # no anchor stays behind


# -- the vocabulary -----------------------------------------------------------------------------------

VOCAB, WIDTH = 5000, 12  # more than two blocks of the vocabulary


@dataclass
class Words:
    """An unembedding, which is never low, and its logsumexp."""

    weight: Tensor
    bias: Tensor | None
    ours: Vocabulary
    x0: Tensor

    def exact(self, x: Tensor) -> Tensor:
        """In float64."""
        bias = None if self.bias is None else self.bias.double()
        return F.linear(x.double(), self.weight.double(), bias).logsumexp(-1)


def words_of(rows: int, *, bias: bool, seed: int = 0, spread: float = 1.0) -> Words:
    """With shifts for random rows whose logits have this spread."""
    weight = weight_of(VOCAB, WIDTH, seed) / WIDTH**0.5
    b = 0.3 * weight_of(1, VOCAB, seed + 1)[0] if bias else None
    x0 = spread * weight_of(rows, WIDTH, seed + 2)
    unembedding = torch.nn.Linear(WIDTH, VOCAB, bias=bias)
    unembedding.weight.data = weight
    ours = Vocabulary(unembedding, b, F.linear(x0, weight, b).logsumexp(-1))
    return Words(weight, b, ours, x0)


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (3, 7), (600, 2), (50, 23)])
@pytest.mark.parametrize("bias", [True, False])
def test_logsumexp_is_torchs(rows: int, batch: int, bias: bool) -> None:
    """With more rows, and more rows together, than are scored at once; near the shift and not so near."""
    words = words_of(rows, bias=bias)
    x = words.x0.expand(batch, -1, -1)
    found = words.ours(x)
    assert found.shape == (batch, rows) and found.dtype == torch.float64
    torchs = torch.logsumexp(F.linear(words.x0, words.weight, words.bias), -1)
    assert (found - torchs).abs().max() <= 2e-6
    for entry in found[1:]:
        assert torch.equal(entry, found[0])
    for scale in (1e-3, 1.0, 5.0):
        moved = step_from(x, scale, seed=1)
        assert ((words.ours(moved) - words.exact(moved)).abs() <= 2e-6 * (1 + scale)).all()


@pytest.mark.parametrize("bias", [True, False])
def test_logsumexp_far_from_its_shift(bias: bool) -> None:
    """Sums that overflow or vanish are taken again in the textbook way, row by row."""
    words = words_of(6, bias=bias, spread=40.0)  # logsumexps near the shift reach beyond 100
    x = words.x0.expand(5, -1, -1).clone()
    x[0] = 0.0  # exp(logits - shift) vanishes
    x[1] *= 50.0  # and overflows
    x[2, 1] *= -30.0  # in single rows
    x[3, 4] = 1e4
    found, exact = words.ours(x), words.exact(x)
    assert (exact[0] - exact[4]).abs().min() > 50 and (exact[1] - exact[4]).abs().min() > 1000
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-5)
