"""What the projections of a model share: the mode in which they compute, and what is kept for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.precision.anchors import Anchor, Origin
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.mode import Mode
from pahq_hf.precision.products import Product
from tests.helpers import weight_of, wrapped
from tests.models import tiny_llama

pytestmark = pytest.mark.crossing

X = weight_of(3, 8, seed=1)
ANCHOR = Anchor(Origin(X), None)
CONTEXTS: dict[str, Callable[[Mode, Any], AbstractContextManager[Any]]] = {
    "full precision": lambda mode, _: mode.full_precision(),
    "exact tables": lambda mode, _: mode.exact_embeddings(),
    "anchored": lambda mode, key: mode.anchored({key: ANCHOR}),
    "recording": lambda mode, key: mode.recording([key]),
    "streaming": lambda mode, key: mode.streaming({key: Product(torch.ones(2, 8))}),
}


def state(mode: Mode) -> tuple[Any, ...]:
    """All that a mode is."""
    return (*(dict(value) if isinstance(value, dict) else value for value in vars(mode).values()),)


@pytest.mark.parametrize("outer", CONTEXTS)
@pytest.mark.parametrize("inner", CONTEXTS)
def test_modes_nest_and_end_whatever_happens_inside(outer: str, inner: str) -> None:
    mode = Mode()
    first, second = object(), object()
    plain = state(mode)
    with pytest.raises(ZeroDivisionError), CONTEXTS[outer](mode, first):
        between = state(mode)
        assert between != plain
        with pytest.raises(KeyError), CONTEXTS[inner](mode, second):
            assert outer == inner in ("full precision", "exact tables") or state(mode) != between
            raise KeyError
        assert state(mode) == between
        raise ZeroDivisionError
    assert state(mode) == plain


def test_one_switch_is_that_of_every_projection() -> None:
    model = wrapped("llama", regime="rtn").patched
    linears, control = list(model.linears()), model.precision
    low = [linear.dense() for linear in linears]
    with control.full_precision():
        assert all(linear.is_full for linear in linears)
        assert not any(torch.equal(w.dense(), before) for w, before in zip(linears, low, strict=True))
    assert all(torch.equal(w.dense(), before) for w, before in zip(linears, low, strict=True))
    with model.exact_embeddings():  # and not that of embeddings
        assert not any(linear.is_full for linear in linears)


def test_tables_have_a_switch_of_their_own() -> None:
    model = PAHQModel(tiny_llama(), PAHQConfig("rtn", quantize_embeddings=True)).patched
    rows = slice(0, 3)
    (low, *_) = (table.dense(rows) for table in model.embedding_matrices)
    table = model.embedding_matrices[0]
    with model.precision.full_precision():
        assert torch.equal(table.dense(rows), low)
    with model.exact_embeddings():
        assert torch.equal(table.dense(rows), table.exact(rows)) and not torch.equal(table.dense(rows), low)


def test_full_precision_is_streamed_once_for_many_products() -> None:
    """Every product inside is the one of the FP32 weight; nothing is left of it afterwards."""
    model = wrapped("llama", regime="rtn").patched
    control, linears = model.precision, model.layers[0].mlp.linears
    held = control.shared.full.nbytes
    x = weight_of(4, linears[0].in_features, seed=2)
    low = linears[0](x)
    with control.streamed(linears):  # not in full precision: nothing to stream
        assert torch.equal(linears[0](x), low) and not control.mode.streamed
    with control.full_precision(), control.streamed(linears):
        assert set(control.mode.streamed) == set(linears)
        torch.testing.assert_close(linears[0](x), x @ linears[0].exact().T)
    assert torch.equal(linears[0](x), low) and not control.mode.streamed
    assert control.shared.full.nbytes == held


def test_what_was_packed_does_not_outlive_another_dtype() -> None:
    linear = PAHQLinear(weight_of(6, 8, seed=0), weight_of(1, 6, seed=3)[0])
    linear.hold_packed()
    linear.piece(slice(0, 3), slice(0, 8))
    linear.to(torch.float64)
    x = X.double()
    torch.testing.assert_close(linear(x), x @ linear.dense().T + linear.bias)
    assert linear.piece(slice(0, 3), slice(0, 8)).dtype == torch.float64


def test_a_copy_shares_nothing_that_changes() -> None:
    model = wrapped("llama", regime="pahq", compute="fp32").patched
    control = copy.deepcopy(model).precision
    assert control.mode is not model.precision.mode
    with control.full_precision():
        assert not model.precision.mode.is_full
    control.activate("m0")
    assert not model.precision.active and not any(linear.is_raised for linear in model.linears())


def test_state_dicts_are_of_weights_alone() -> None:
    """Whatever is decoded or packed at the time."""
    model = wrapped("llama", regime="rtn").patched
    before = list(model.hf.state_dict())
    for linear in model.linears():
        linear.hold_packed()
    assert list(model.hf.state_dict()) == before
    model.precision.release()
