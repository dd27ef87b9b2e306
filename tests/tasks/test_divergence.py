"""KL divergence near its minimum and far from it, against textbook arithmetic in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pahq_hf.circuit.graph import edge_list
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.engine.sparse.kl import KLReadout
from pahq_hf.tasks.divergence import SERIES, divergence, excess, excess_by_series
from pahq_hf.tasks.metrics import Metric
from tests.helpers import wrapped
from tests.models import random_task
from tests.tasks.test_metrics import make_task
from tests.tiers import examples

ROWS, VOCAB, WIDTH = 3, 5000, 24  # more tokens than two blocks of the vocabulary
TASK = make_task([0, 1, 2], ((),) * ROWS, ((),) * ROWS)
SMALLEST = 1e-9  # below it, the textbook form has no digits left to compare with


def textbook(reference: Tensor, logits: Tensor) -> Tensor:
    """`sum p (log p - log q)` in float64. [..., vocab] -> [...]"""
    log_p, log_q = (x.to(torch.float64).log_softmax(-1) for x in (reference, logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@examples(200)
@given(seed=st.integers(0, 10_000), scale=st.floats(0, 40), step=st.floats(-6, 3), shift=st.floats(-50, 50))
def test_kl_of_logits(seed: int, scale: float, step: float, shift: float) -> None:
    reference = drawn(ROWS, 200, seed=seed) * scale
    logits = reference + drawn(ROWS, 200, seed=seed + 1) * 10**step + shift
    found = Metric("kl", TASK, reference).rows(logits)
    assert (found >= 0).all()
    expected = textbook(reference, logits)
    far = expected > SMALLEST
    torch.testing.assert_close(found[far], expected[far], rtol=1e-4, atol=0)
    assert (found[~far] < 2 * SMALLEST).all()


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-12])
def test_kl_near_its_minimum_is_half_the_variance(size: float) -> None:
    """Where float64's textbook form has no digits left: KL = Var_p(d) / 2 + O(d^3)."""
    reference, change = drawn(ROWS, 200, seed=1) * 3, drawn(ROWS, 200, seed=2) * size
    p = reference.softmax(-1)
    variance = (p * (change - (p * change).sum(-1, keepdim=True)) ** 2).sum(-1)
    found = divergence(p.log(), change)
    torch.testing.assert_close(found, variance / 2, rtol=5 * size + 1e-3, atol=0)


def test_the_excess_of_the_exponential() -> None:
    """Both forms where they are used, against the series in exact arithmetic."""
    points = [s * x for s in (-1, 1) for x in (1e-9, 1e-6, 1e-4, 1e-3, 0.01, 0.05, SERIES)]
    exact = torch.tensor([sum(x**k / math.factorial(k) for k in range(2, 20)) for x in points])
    u = torch.tensor(points)  # float32
    torch.testing.assert_close(excess_by_series(u), exact, rtol=3e-7, atol=0)
    torch.testing.assert_close(excess(u.double()).float(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(excess(torch.tensor([-20.0, 5.0])), torch.tensor([19.0, math.exp(5) - 6]))


# -- from hidden states ---------------------------------------------------------------------------


def readout_of(clean: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0) -> KLReadout:
    unembedding = torch.nn.Linear(WIDTH, VOCAB, bias=bias is not None, dtype=weight.dtype)
    unembedding.weight.data = weight
    logits = clean @ weight.T
    if bias is not None:
        unembedding.bias.data = bias
        logits = logits + bias
    return KLReadout(logits * scale, unembedding, clean, scale=scale)


@examples(60)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.3, 3.0, 30.0]),
    step=st.floats(-5, 1.5),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    batch=st.sampled_from([1, 4, 200]),
)
@example(seed=0, spread=30.0, step=1.5, bias=True, scale=1.0, batch=4)  # far beyond float32's exponentials
@example(seed=0, spread=3.0, step=-4.0, bias=False, scale=1.0, batch=1)
def test_kl_of_hidden_states(
    seed: int, spread: float, step: float, bias: bool, scale: float, batch: int
) -> None:
    """In FP32, with a batch whose entries differ by ten orders of magnitude."""
    weight = (drawn(VOCAB, WIDTH, seed=seed) / WIDTH**0.5).float()
    b = 0.3 * drawn(VOCAB, seed=seed + 1).float() if bias else None
    clean = (spread * drawn(ROWS, WIDTH, seed=seed + 2)).float()
    steps = torch.logspace(-5, step, batch)[:, None, None]
    x = clean + steps * drawn(batch, ROWS, WIDTH, seed=seed + 3).float()
    found = readout_of(clean, weight, b, scale).rows(x)
    assert found.dtype == torch.float64 and (found >= 0).all()
    for entry, values in zip(x[:4], found[:4], strict=False):
        both = (
            (h.double() @ weight.double().T + (0 if b is None else b.double())) * scale
            for h in (clean, entry)
        )
        expected = textbook(*both)
        far = expected > SMALLEST
        torch.testing.assert_close(values[far], expected[far], rtol=1e-3, atol=0)
    assert (readout_of(clean, weight, b, scale).rows(clean[None]) == 0).all()


def test_kl_of_hidden_states_that_are_not_numbers() -> None:
    clean, weight = drawn(ROWS, WIDTH, seed=1).float(), drawn(VOCAB, WIDTH, seed=2).float()
    x = clean.clone()[None]
    x[0, 1, 3] = math.nan
    values = readout_of(clean, weight, None).rows(x)[0]
    assert values.isnan().tolist() == [False, True, False]


def test_a_softcap_does_not_cancel() -> None:
    """Gemma 2 bounds its logits: their change, against both in float64."""
    narrow, wide = (wrapped("gemma2", dtype=dtype).patched for dtype in (torch.float32, torch.float64))
    assert narrow.arch.logit_softcap is not None
    width = narrow.unembedding.in_features
    clean = 3 * drawn(4, width, seed=1).float()
    for size in (1e-5, 1e-2, 3.0):
        x = clean + size * drawn(4, width, seed=2).float()
        expected = wide.logits(x.double()) - wide.logits(clean.double())
        found = narrow.logit_change(x, clean)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_the_engines_agree_about_edges_that_hardly_matter(name: str) -> None:
    """Each edge's effect alone, where it is small, by both engines in FP32 and by one in float64."""
    task = random_task(batch=3, length=7, seed=9)
    narrow, wide = (wrapped(name, dtype=dtype).patched for dtype in (torch.float32, torch.float64))
    graph = narrow.graph
    sparse, hooks, judge = (
        SparseEngine(narrow, task, "kl"),
        HooksEngine(narrow, task, "kl"),
        HooksEngine(wide, task, "kl"),
    )
    assert sparse.metric_of(graph.all_edges) == 0
    small = 0
    for edge in edge_list(graph.all_edges):
        kept = graph.all_edges.copy()
        kept[edge] = False
        exact, *ours = (engine.metric_of(kept) for engine in (judge, sparse, hooks))
        assert min(ours) >= 0
        if 1e-8 < exact < 1e-2:
            small += 1
            assert ours == pytest.approx([exact, exact], rel=3e-6 / math.sqrt(exact))
    assert small >= 3


# -- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1e-6, 1e-3, 1.0, 30.0, 300.0])
def test_the_gradient_is_the_difference_of_the_distributions(step: float) -> None:
    reference = 3 * drawn(ROWS, 50, seed=3)
    logits = (reference + step * drawn(ROWS, 50, seed=4)).requires_grad_()
    metric = Metric("kl", TASK, reference)
    (gradient,) = torch.autograd.grad(metric.rows(logits).sum(), logits)
    p, q = reference.softmax(-1), logits.detach().softmax(-1)
    torch.testing.assert_close(gradient, q - p, rtol=1e-6, atol=1e-12 * step)
