"""ACDC with verified estimates takes ACDC's decisions on random models: flips are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.setting import Setting
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.acdc_run import with_margin
from pahq_hf.search.batches import AdaptiveBatch
from pahq_hf.search.state import Search
from tests.helpers import ALL_GRAPHS, wrapped
from tests.models import random_task

REGIMES = ("fp32", "pahq", "rtn")
METRICS = ("kl", "logit_diff", "nll")
SEARCHES = 2000
QUICK = 8
LAYERS = 4  # with fewer, readers have so few edges that nearly all are tested


@dataclass(frozen=True)
class Case:
    """A model, prompts, and what is searched."""

    graph: str
    weights: int
    prompts: int
    regime: str
    engine: Any
    metric: str
    threshold: float
    absolute: bool

    def found(self, tests: Any) -> Search:
        model = wrapped(self.graph, layers=LAYERS, seed=self.weights, regime=self.regime)
        task = random_task(batch=2, length=5, seed=self.prompts, metric=self.metric)
        setting = Setting(model.patched, task, self.metric, "corrupted", model.pahq_config)
        options = ACDCConfig(threshold=self.threshold, absolute=self.absolute, tests=tests)
        config = with_margin(options, model.pahq_config)
        return search(make_engine(setting, EngineConfig(self.engine)), config, batch=AdaptiveBatch())


@dataclass
class Tally:
    """What a number of cases came to.

    Attributes:
        searches: Pairs of searches, one of which tests every edge.
        flipped: Those that end at different circuits.
        unseen: Those among them whose audit found nothing wrong.
        edges: Edges decided by scores.
        estimated: Those decided by estimates.
        audited: Estimates that were audited.
        wrong: Wrong ones among them.
    """

    searches: int = 0
    flipped: int = 0
    unseen: int = 0
    edges: int = 0
    estimated: int = 0
    audited: int = 0
    wrong: int = 0

    def add(self, case: Case) -> None:
        """Search it both ways."""
        every, ours = case.found("all"), case.found("verified")
        self.searches += 1
        self.edges += int(ours.tested.sum())
        self.estimated += int(ours.estimated.sum())
        self.audited += sum(record.counts.audited for record in ours.records)
        self.wrong += sum(record.counts.wrong for record in ours.records)
        if not np.array_equal(every.kept, ours.kept):
            self.flipped += 1
            self.unseen += not any(record.counts.wrong for record in ours.records)
            print(f"flips {int((every.kept != ours.kept).sum())} edges: {case}")


def drawn(seed: int) -> Case:
    """A case of a random kind."""
    rng = np.random.default_rng(seed)
    regime = str(rng.choice(REGIMES))
    return Case(
        graph=str(rng.choice(sorted(ALL_GRAPHS))),
        weights=int(rng.integers(3)),
        prompts=int(rng.integers(1_000_000)),
        regime=regime,
        engine="hooks" if rng.random() < 0.1 else "sparse",
        metric=str(rng.choice(METRICS)),
        threshold=float(10 ** rng.uniform(-1.7, 0)),
        absolute=bool(rng.random() < 0.3),
    )


@settings(derandomize=True, max_examples=QUICK, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_decisions_are_acdcs_or_the_audit_says_that_some_are_not(seed: int) -> None:
    tally = Tally()
    tally.add(drawn(seed))
    assert tally.unseen == 0


@pytest.mark.exhaustive
def test_flips_of_many_searches(capsys: pytest.CaptureFixture[str]) -> None:
    """On random tiny models, which are as far from linear as models get."""
    tally = Tally()
    for seed in range(SEARCHES):
        tally.add(drawn(seed))
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.estimated > 0.2 * tally.edges
    assert tally.flipped <= 0.05 * SEARCHES
    assert tally.unseen <= 0.01 * SEARCHES
