"""Second looks: edges whose score lies near the threshold are tested again in FP32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pahq_hf import PAHQConfig, PAHQModel, load_task
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.protocol import Trial
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.batches import AdaptiveBatch, BatchSize, FixedBatch
from pahq_hf.search.journal import Journal
from pahq_hf.search.replay import record_of, step_of
from pahq_hf.search.state import ReaderRecord, Search
from tests.helpers import wrapped
from tests.models import FAMILIES, random_task
from tests.tiers import examples, exhaustive

pytestmark = pytest.mark.crossing

TASK = random_task(batch=3, length=7, padding="right", seed=11)
THRESHOLDS = {"kl": (0.003, 0.03, 0.15), "logit_diff": (0.01, 0.1, 0.4)}
BATCHES: dict[str, Callable[[], BatchSize]] = {
    "1": lambda: FixedBatch(1),
    "2": lambda: FixedBatch(2),
    "7": lambda: FixedBatch(7),
    "adaptive": AdaptiveBatch,
}


def assert_same_decisions(ours: Search, exact: Search) -> None:
    """Assert that what was kept, what was tested and in which order are the same."""
    assert np.array_equal(ours.kept, exact.kept)
    assert np.array_equal(ours.tested, exact.tested)
    ran, wanted = ([(r.reader, r.searched, r.kept, list(r.scores)) for r in s.records] for s in (ours, exact))
    assert ran == wanted


# -- a look at every edge: FP32's decisions, whatever the weights ----------------------------------------


@cache
def fp32_search(name: str, metric: Any, config: ACDCConfig) -> Search:
    return search(SparseEngine(wrapped(name).patched, TASK, metric), config, batch=AdaptiveBatch())


@pytest.mark.parametrize("metric", THRESHOLDS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(("kind", "compute"), [("sparse", "bf16"), ("hooks", "fp32")])
def test_with_an_infinite_margin_decisions_are_fp32s(kind: str, compute: Any, name: str, metric: Any) -> None:
    config = PAHQConfig("pahq", "fp8", compute=compute)
    model = PAHQModel(FAMILIES[name](), config).patched
    make: Any = SparseEngine if kind == "sparse" else HooksEngine
    engine = make(model, TASK, metric, rule=RegimeRule.of(config, model.device))
    changed, (low, middle, high) = 0, THRESHOLDS[metric]
    cases: list[tuple[float, Any, bool]] = [(low, "acdc", False), (middle, "head", True)]
    if kind == "hooks":  # it is slow: another case for each metric
        cases = cases[:1] if metric == "kl" else cases[1:]
    else:
        cases += [(middle, "acdc", True), (high, "head", False)]
    for threshold, order, absolute in cases:
        exact = fp32_search(name, metric, ACDCConfig(threshold, order=order, absolute=absolute))
        endless = ACDCConfig(threshold, order=order, absolute=absolute, margin=math.inf)
        ours = search(engine, endless, batch=AdaptiveBatch() if kind == "sparse" else FixedBatch(3))
        assert_same_decisions(ours, exact)
        assert np.abs(ours.scores - exact.scores).max() <= 1e-5
        assert not engine.session.holding.active
        for record in ours.records:
            assert record.looks >= len(record.scores)
            assert (record.looks == len(record.scores)) or record.changed
        changed += sum(record.changed for record in ours.records)
    assert changed > 0 or kind == "hooks"  # or low precision had nothing to change


@pytest.mark.parametrize(("metric", "threshold"), [("kl", 0.005), exhaustive("logit_diff", 0.02)])
def test_with_an_infinite_margin_the_demos_circuit_is_fp32s(metric: Any, threshold: float) -> None:
    fp32, pahq = demo("fp32"), demo("pahq")
    task = load_task("ioi", fp32.tokenizer, n=12)
    options: dict[str, Any] = {"threshold": threshold, "metric": metric, "progress": False}
    exact = fp32.discover(task, **options)
    ours = pahq.discover(task, **options, margin=math.inf)
    assert np.array_equal(ours.kept, exact.kept) and np.array_equal(ours.tested, exact.tested)
    assert np.abs(ours.scores - exact.scores).max() <= 1e-5
    assert 0 < ours.edge_count < ours.graph.edge_count
    for name in ("full", "empty", "final", "fp32"):
        assert ours.discovery["metric"][name] == pytest.approx(exact.discovery["metric"][name], abs=1e-5)


@cache
def demo(regime: Any) -> PAHQModel:
    return PAHQModel.from_pretrained("demo", PAHQConfig(regime))


# -- an engine that errs by a known amount ---------------------------------------------------------------


class Noisy(SparseEngine):
    """FP32, but what it finds for an edge set strays by up to 15 % of the threshold, always alike."""

    def __init__(self, name: str, tau: float, seed: int) -> None:
        super().__init__(wrapped(name).patched, TASK, "kl")
        self.tau, self.seed = tau, seed
        self.looks: dict[int, int] = {}

    def noise(self, reader: int, gone: set[int]) -> float:
        """The error for these edges into the reader gone; none for what `focus` measures."""
        draw = np.random.default_rng([self.seed, reader, *sorted(gone)])
        return 0.15 * self.tau * float(draw.uniform(-1, 1)) if gone else 0.0

    def focus(self, reader: int) -> float | None:
        super().focus(reader)
        lacking = np.flatnonzero(self.graph.all_edges[reader] & ~self._kept[reader]).tolist()
        return super().try_(reader, [lacking]).values[0]

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        values = super().try_(reader, candidates).values
        noises = [self.noise(reader, set(candidate)) for candidate in candidates]
        strayed = [value + noise for value, noise in zip(values, noises, strict=True)]
        return Trial.of(reader, candidates, strayed)

    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        self.looks[reader] = self.looks.get(reader, 0) + len(candidates) // 2
        return super().look_again(reader, candidates)


def first_scores(engine: Noisy, exact: ReaderRecord) -> dict[int, float]:
    """What the first test of every edge finds when all earlier decisions are the exact ones."""
    found, gone = {}, set[int]()
    for writer, score in exact.scores.items():
        after, before = (engine.noise(exact.reader, g) for g in (gone | {writer}, gone))
        found[writer] = score + after - before
        if writer not in exact.kept:
            gone.add(writer)
    return found


# Seeds whose noise does change decisions.
CASES = [
    ("llama", 0.02, False, "acdc", 6), ("llama", 0.03, True, "head", 3),
    exhaustive("gpt2", 0.01, True, "acdc", 6), exhaustive("gpt2", 0.03, False, "head", 6),
]  # fmt: skip
each_case = pytest.mark.parametrize(("name", "tau", "absolute", "order", "seed"), CASES)


def configured(tau: float, absolute: bool, order: Any, margin: float | None = 0.5) -> ACDCConfig:
    return ACDCConfig(threshold=tau, absolute=absolute, order=order, margin=margin)


@each_case
def test_second_looks_undo_what_noise_decided(
    name: str, tau: float, absolute: bool, order: Any, seed: int
) -> None:
    """Noise of both measurements is below a third of tau: a margin of a half covers it."""
    exact = fp32_search(name, "kl", configured(tau, absolute, order, None))
    blind = [
        search(Noisy(name, tau, seed), configured(tau, absolute, order, 0.0), batch=make())
        for make in (BATCHES["1"], BATCHES["7"])
    ]
    assert all(np.array_equal(one.kept, blind[0].kept) for one in blind)
    assert not np.array_equal(blind[0].kept, exact.kept)  # without a second look it goes wrong
    assert not any(record.looks or record.changed for record in blind[0].records)
    for make in BATCHES.values():
        engine = Noisy(name, tau, seed)
        found = search(engine, configured(tau, absolute, order), batch=make())
        assert_same_decisions(found, exact)
        for record, right in zip(found.records, exact.records, strict=True):
            check_record(engine, record, right, configured(tau, absolute, order))
        assert sum(record.changed for record in found.records) > 0
        assert max(record.looks - record.changed for record in found.records) > 1


def check_record(engine: Noisy, record: ReaderRecord, exact: ReaderRecord, config: ACDCConfig) -> None:
    """Scores, looks and changes of one reader are those that the known noise calls for."""

    def size(score: float) -> float:
        return abs(score) if config.absolute else score

    tau, margin = config.threshold, config.margin or 0.0
    first = first_scores(engine, exact)
    near = {w for w, score in first.items() if abs(size(score) - tau) <= margin * tau}
    wrong = {w for w in near if (size(first[w]) >= tau) != (w in exact.kept)}
    for writer, score in record.scores.items():
        expected = exact.scores[writer] if writer in near else first[writer]
        assert score == pytest.approx(expected, abs=2e-6)
    assert record.changed == len(wrong) <= record.looks
    assert record.looks == engine.looks.get(record.reader, 0)
    if record.changed:  # edges decided on a wrong way are looked at for nothing
        assert record.looks >= len(near)
    else:
        assert record.looks == len(near)


@examples(15)
@given(
    seed=st.integers(0, 2**32 - 1),
    tau=st.sampled_from([0.003, 0.01, 0.02, 0.05]),
    absolute=st.booleans(),
    order=st.sampled_from(["acdc", "head"]),
    margin=st.sampled_from([0.31, 0.5, 2.0, math.inf]),
    size=st.integers(1, 12),
)
def test_any_noise_within_the_margin_is_harmless(
    seed: int, tau: float, absolute: bool, order: Any, margin: float, size: int
) -> None:
    exact = fp32_search("llama", "kl", configured(tau, absolute, order, None))
    engine, config = Noisy("llama", tau, seed), configured(tau, absolute, order, margin)
    found = search(engine, config, batch=FixedBatch(size))
    assert_same_decisions(found, exact)
    if margin < math.inf:
        for record, right in zip(found.records, exact.records, strict=True):
            check_record(engine, record, right, config)


@each_case
@pytest.mark.parametrize("size", ["2", "7", "adaptive"])
def test_progress_adds_up_despite_going_back(
    name: str, tau: float, absolute: bool, order: Any, seed: int, size: str
) -> None:
    engine, reports = Noisy(name, tau, seed), list[tuple[int, int]]()
    found = search(
        engine,
        configured(tau, absolute, order),
        batch=BATCHES[size](),
        on_batch=lambda reader, decided: reports.append((reader, decided)),
    )
    prefix, done = engine.graph.prefix, dict[int, int]()
    for reader, decided in reports:
        assert decided != 0
        done[reader] = done.get(reader, 0) + decided
        assert 0 < done[reader] <= prefix[reader]
    searched = [record.reader for record in found.records if record.scores]
    assert done == {reader: prefix[reader] for reader in searched}
    assert sum(decided for _, decided in reports) == int(found.tested.sum())
    assert sum(decided for _, decided in reports if decided > 0) > found.tested.sum()  # it did go back


@each_case
def test_a_run_with_second_looks_resumes(
    name: str, tau: float, absolute: bool, order: Any, seed: int, tmp_path: Path
) -> None:
    """From any record of its journal, to the bit."""
    config, header = configured(tau, absolute, order), {"run": 1}
    journal = Journal.create(tmp_path, header)
    whole = search(
        Noisy(name, tau, seed),
        config,
        batch=AdaptiveBatch(),
        on_reader=lambda _, record: journal.append(step_of(record)),
    )
    done = [record_of(step) for step in Journal.resume(tmp_path, header).steps]
    assert [asdict(record) for record in done] == [asdict(record) for record in whole.records]
    assert sum(record.changed for record in done) > 0
    for cut in range(0, len(done) + 1, 4):
        rest = search(Noisy(name, tau, seed), config, batch=AdaptiveBatch(), done=done[:cut])
        assert [asdict(record) for record in rest.records] == [asdict(record) for record in whole.records]
        assert np.array_equal(rest.kept, whole.kept) and np.array_equal(rest.scores, whole.scores)
        assert rest.metric == whole.metric
