"""What a run says it computed: all of it, whoever computed it and in however many parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import Circuit
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.setting import Setting
from tests.helpers import interrupted_after, wrapped
from tests.models import random_task
from tests.tiers import quick

TASK = random_task(batch=4, seed=21, metric="kl")
SEARCHES: dict[str, dict[str, Any]] = {
    "acdc": {"threshold": 0.05},
    "budget": {"search": "budget", "max_gap": 0.2, "threshold": 0.05},
    "verified": {"threshold": 0.05, "tests": "verified"},
    "refine": {"search": "refine", "edges": 9, "steps": 1, "minibatch": 3},
    "exact": {"search": "exact", "topn": 9},
}


def discover(out: Path, **options: Any) -> Circuit:
    return wrapped("gpt2", layers=1).discover(TASK, out=out, progress=False, **options)


@pytest.mark.parametrize("name", quick(SEARCHES, "acdc", "refine", "exact"))
def test_evaluations_are_those_of_all_parts(name: str, tmp_path: Path) -> None:
    """A part that goes on measures some again, and none less than a run in one go."""
    whole = discover(tmp_path / "whole", **SEARCHES[name]).record.evaluations
    with interrupted_after(3):
        discover(tmp_path / "run", **SEARCHES[name])
    before = json.loads((tmp_path / "run" / "seconds.json").read_text())["evaluations"]
    with interrupted_after(1):
        discover(tmp_path / "run", resume=True, **SEARCHES[name])
    between = json.loads((tmp_path / "run" / "seconds.json").read_text())["evaluations"]
    ours = discover(tmp_path / "run", resume=True, **SEARCHES[name]).record.evaluations
    assert whole is not None and ours is not None and 0 < before < between < ours
    assert whole <= ours < 3 * whole


def test_what_a_sweep_computed_and_took_over_is_that_of_all_parts(tmp_path: Path) -> None:
    model = wrapped("gpt2", layers=1)
    options: dict[str, Any] = {"thresholds": [0.05, 0.2], "progress": False}
    whole = model.sweep(TASK, **options)
    with interrupted_after(len(model.graph.readers) + 5):
        model.sweep(TASK, out=tmp_path / "run", **options)
    ours = model.sweep(TASK, out=tmp_path / "run", resume=True, **options)
    for mine, theirs in zip(ours.rows, whole.rows, strict=True):
        assert mine.evaluations + mine.reused >= theirs.evaluations + theirs.reused > 0


@pytest.mark.parametrize("kind", ["sparse", "hooks"])
def test_both_engines_count_every_value(kind: Any) -> None:
    model = wrapped("gpt2", layers=1)
    setting = Setting(model.patched, TASK, "kl", "corrupted", model.pahq_config)
    engine: Engine = make_engine(setting, EngineConfig(engine=kind))
    kept = engine.graph.all_edges.copy()
    counted = engine.evaluations
    engine.metric_of(kept)
    assert engine.evaluations == counted + 1
    effects = engine.drop_each(kept)
    edges = int(kept.sum())
    assert np.count_nonzero(effects) <= edges
    assert engine.evaluations >= counted + 1 + int(np.count_nonzero(effects))
