"""Random searches with verified estimates and without, counted. So many of them, as JSON lines and in sum:

python -m tests.search.flips 2000 --out flips.jsonl

Models are tiny, random, and so as far from linear as models get. A file that is there goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

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

    @classmethod
    def drawn(cls, seed: int) -> Case:
        """A case of a random kind."""
        rng = np.random.default_rng(seed)
        regime = str(rng.choice(REGIMES))
        return cls(
            graph=str(rng.choice(sorted(ALL_GRAPHS))),
            weights=int(rng.integers(3)),
            prompts=int(rng.integers(1_000_000)),
            regime=regime,
            engine="hooks" if rng.random() < 0.1 else "sparse",
            metric=str(rng.choice(METRICS)),
            threshold=float(10 ** rng.uniform(-1.7, 0)),
            absolute=bool(rng.random() < 0.3),
        )

    def found(self, tests: Any) -> tuple[Search, int]:
        """Search it, with all edges tested or verified estimates; how many metrics were computed."""
        model = wrapped(self.graph, layers=LAYERS, seed=self.weights, regime=self.regime)
        task = random_task(batch=2, length=5, seed=self.prompts, metric=self.metric)
        setting = Setting(model.patched, task, self.metric, "corrupted", model.pahq_config)
        options = ACDCConfig(threshold=self.threshold, absolute=self.absolute, tests=tests)
        config = with_margin(options, model.pahq_config)
        engine = make_engine(setting, EngineConfig(self.engine))
        return search(engine, config, batch=AdaptiveBatch()), engine.evaluations


@dataclass(frozen=True)
class Comparison:
    """What a case came to.

    Attributes:
        seed: Of the case.
        flipped: Edges that are in one circuit only.
        edges: Edges decided by scores.
        estimated: Those decided by estimates.
        audited: Estimates that were audited.
        wrong: Wrong ones among them.
        evaluations: Metrics of circuits that were computed to verify estimates.
        tests: And to test every edge.
    """

    seed: int
    flipped: int
    edges: int
    estimated: int
    audited: int
    wrong: int
    evaluations: int
    tests: int

    @classmethod
    def of(cls, seed: int) -> Comparison:
        """Search a case both ways."""
        case = Case.drawn(seed)
        (every, tests), (ours, evaluations) = case.found("all"), case.found("verified")
        return cls(
            seed=seed,
            flipped=int((every.kept != ours.kept).sum()),
            edges=int(ours.tested.sum()),
            estimated=int(ours.estimated.sum()),
            audited=sum(record.counts.audited for record in ours.records),
            wrong=sum(record.counts.wrong for record in ours.records),
            evaluations=evaluations,
            tests=tests,
        )


@dataclass(frozen=True)
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

    searches: int
    flipped: int
    unseen: int
    edges: int
    estimated: int
    audited: int
    wrong: int

    @classmethod
    def of(cls, comparisons: Iterable[Comparison]) -> Tally:
        """Count."""
        found = list(comparisons)
        return cls(
            searches=len(found),
            flipped=sum(one.flipped > 0 for one in found),
            unseen=sum(one.flipped > 0 and one.wrong == 0 for one in found),
            edges=sum(one.edges for one in found),
            estimated=sum(one.estimated for one in found),
            audited=sum(one.audited for one in found),
            wrong=sum(one.wrong for one in found),
        )


def main() -> int:
    """Compare searches and print what they came to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("searches", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = {}
    if options.out.exists():
        for line in options.out.read_text().splitlines():
            found[json.loads(line)["seed"]] = Comparison(**json.loads(line))
    with options.out.open("a") as file:
        for seed in range(options.searches):
            if seed in found:
                continue
            found[seed] = Comparison.of(seed)
            print(json.dumps(asdict(found[seed])), file=file, flush=True)
            if found[seed].flipped:
                print(found[seed], Case.drawn(seed), flush=True)
    print(Tally.of(found[seed] for seed in range(options.searches)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
