"""Scores of families whose MLP adds more than its last projection gives, in every regime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse import arithmetic
from pahq_hf.engine.sparse.engine import SparseEngine
from tests.families import ALL_FAMILIES
from tests.models import random_task

# A norm before a block, after it, both; a multiplier; a residual inside the MLP; experts.
FAMILIES = ("gpt2", "olmo2", "gemma2", "granite", "bloom", "qwen3_moe")
RULES = {"pahq": RegimeRule(True, True, False, torch.float32), "rtn": None, "fp32": None}
READERS = ("m1", "a1.h0<q>", "m0")


def engine_of(kind: Any, family: str, regime: Any) -> Any:
    """Of a tiny model kept low; products are FP32, so that engines can be compared."""
    model = PAHQModel(ALL_FAMILIES[family](layers=2), PAHQConfig(regime, compute="fp32")).patched
    return kind(model, random_task(batch=3, length=6, padding="left"), "kl", rule=RULES[regime])


def scores(engine: Any) -> NDArray[np.float64]:
    """What removing each edge of some readers does to the metric, in the whole graph."""
    found, names = [], [reader.name for reader in engine.graph.readers]
    for reader in map(names.index, READERS):
        begun = engine.begin(engine.graph.all_edges)
        focused = engine.focus(reader)
        edges = [[writer] for writer in engine.graph.in_edges(reader)]
        first, again = (np.array(engine.try_(reader, edges).values) for _ in range(2))
        assert np.array_equal(first, again)  # nothing that was read has been written to
        found.append(first - (begun if focused is None else focused))
    engine.finish()
    return np.concatenate(found)


@pytest.mark.crossing
@pytest.mark.parametrize("regime", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_score_alike_however_many_tokens_go_at_once(
    family: str, regime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few tokens go through a node at once on the CPU, all of them on a GPU."""
    expected = scores(engine_of(HooksEngine, family, regime))
    assert np.abs(expected).max() > 1e-4
    sparse = engine_of(SparseEngine, family, regime)
    for tokens in (5, 1 << 30):
        monkeypatch.setattr(arithmetic, "_CHUNK", tokens)
        assert scores(sparse) == pytest.approx(expected, abs=1e-5)
