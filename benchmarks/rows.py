"""One row of the speed benchmark: a whole search by one engine, or an extrapolation from single tests."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

from benchmarks.recording import Log, Recorder, Sample, repeat_tests
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.config import EngineConfig, EngineName, PAHQConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.setting import Setting
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.memory import PeakMemory, read_memory, trim
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.batches import AdaptiveBatch, BatchSize, FixedBatch
from pahq_hf.tasks.base import Task

HOOKS, SEQUENTIAL, SPECULATIVE = ENGINES = ("hooks", "sequential", "speculative")
"""What is compared: the hooks engine, and the sparse engine without and with speculation."""


@dataclass
class Row:
    """What one engine took for one search.

    Attributes:
        regime: Precision regime.
        engine: One of `ENGINES`.
        complete: Whether the whole search was run and timed; else the times are extrapolated.
        tests: Edges tested.
        seconds: Time of capture and search.
        ms_per_test: `seconds` over `tests`, in milliseconds.
        phases: `seconds` by what they went into.
        evaluations: Metric values computed.
        candidates: Those computed to decide an edge.
        batches: Batches they came in.
        acceptance: `tests` over `candidates`.
        kept: Edges left at the end.
        final: Metric at the end.
        same_edges: Whether these are the edges that the speculative run kept.
        anonymous: Peak anonymous memory of the process, in bytes.
        anonymous_before: The same just before: the model, libraries and data.
        sample: Single tests timed on their own, and how their values compare with the speculative run's.
        hooks_ratio: How many times faster per test than the first hooks row.
        forward_ratio: `tests` bare forward passes over `seconds`.
    """

    regime: str
    engine: str
    complete: bool
    tests: int
    seconds: float
    ms_per_test: float
    phases: dict[str, float]
    evaluations: int | None = None
    candidates: int | None = None
    batches: int | None = None
    acceptance: float | None = None
    kept: int | None = None
    final: float | None = None
    same_edges: bool | None = None
    anonymous: int = 0
    anonymous_before: int = 0
    sample: Sample | None = None
    hooks_ratio: float | None = None
    forward_ratio: float | None = None


@dataclass(frozen=True)
class _Fast:
    """What the other rows take from the speculative run; not its engine, which is large."""

    log: Log
    kept: BoolArray
    refresh: float


@dataclass
class Regime:
    """One model at one precision, and how its rows are measured.

    Attributes:
        model: The patched model.
        task: The prompts.
        metric: What is minimised.
        name: Its precision as the command line names it.
        pahq: Its precision.
        acdc: The search.
        sample: Tests timed one by one.
        limit: Seconds a slow engine may take for the whole search.
        memory_budget: Bytes for candidates and decoded weights.
    """

    model: PatchedModel
    task: Task
    metric: str
    name: str
    pahq: PAHQConfig
    acdc: ACDCConfig
    sample: int = 40
    limit: float = 300.0
    memory_budget: int | None = None
    _fast: _Fast | None = None

    def row(self, engine: str) -> Row:
        """Measure an engine; the speculative one goes first: the others repeat tests of its run."""
        if engine == SPECULATIVE:
            return self._whole(engine)
        sampled = self._sampled(engine)
        if sampled.seconds > self.limit:
            return sampled
        row = self._whole(engine)
        row.sample = sampled.sample
        return row

    def make(self, engine: str) -> Engine:
        """The engine of a row."""
        name: EngineName = "hooks" if engine == HOOKS else "sparse"
        config = EngineConfig(engine=name, memory_budget=self.memory_budget)
        return make_engine(Setting(self.model, self.task, self.metric, self.acdc.ablation, self.pahq), config)

    def _whole(self, name: str) -> Row:
        """Run and time the whole search."""
        batch: BatchSize = AdaptiveBatch() if name == SPECULATIVE else FixedBatch(1)
        before = settled_memory()
        with PeakMemory() as peak:
            started = time.perf_counter()
            engine = self.make(name)
            captured = time.perf_counter() - started
            recorder = Recorder(engine)
            state = search(recorder, self.acdc, batch=batch)
            seconds = time.perf_counter() - started
        log, phases = recorder.log, _phases(engine, captured, seconds)
        tests = len(log.tests)
        if tests != int(state.tested.sum()):
            raise RuntimeError(f"recorded {tests} tests of {int(state.tested.sum())}")
        if name == SPECULATIVE:
            self._fast = _Fast(log, state.kept, phases.get("refresh", 0.0))
        return Row(
            regime=self.name,
            engine=name,
            complete=True,
            tests=tests,
            seconds=seconds,
            ms_per_test=1000 * seconds / tests,
            phases=phases,
            evaluations=recorder.evaluations,
            candidates=log.candidates,
            batches=log.batches,
            acceptance=tests / log.candidates,
            kept=int(state.kept.sum()),
            final=engine.metric_of(state.kept),
            same_edges=None if self._fast is None else bool((state.kept == self._fast.kept).all()),
            anonymous=peak.report()["anonymous"],
            anonymous_before=before,
        )

    def _sampled(self, name: str) -> Row:
        """Time single tests, and extrapolate from their mean."""
        if self._fast is None:
            raise RuntimeError("the speculative run goes first: it tells which tests there are")
        before = settled_memory()
        with PeakMemory() as peak:
            started = time.perf_counter()
            engine = self.make(name)
            captured = time.perf_counter() - started
            sample = repeat_tests(engine, self._fast.log, self.sample, warm=name != HOOKS)
        tests = len(self._fast.log.tests)
        phases = {"capture": captured, "tests": tests * sample.mean_ms / 1000}
        if name != HOOKS:  # the decisions are the same, and so is this work
            phases["refresh"] = self._fast.refresh
        seconds = sum(phases.values())
        return Row(
            regime=self.name,
            engine=name,
            complete=False,
            tests=tests,
            seconds=seconds,
            ms_per_test=1000 * seconds / tests,
            phases=phases,
            candidates=tests,
            batches=tests,
            acceptance=1.0,
            anonymous=peak.report()["anonymous"],
            anonymous_before=before,
            sample=sample,
        )


def _phases(engine: Engine, captured: float, seconds: float) -> dict[str, float]:
    """A search's seconds by phase; what no phase counts is `other`."""
    if engine.name == "hooks":
        return {"capture": captured, "tests": seconds - captured}
    phases = dict(engine.phases.seconds)
    return phases | {"other": seconds - sum(phases.values())}


def settled_memory() -> int:
    """Give freed memory back to the system. Returns the anonymous bytes left."""
    gc.collect()
    trim()
    return read_memory().get("anonymous", 0)


def compare(rows: list[Row], forward: float) -> None:
    """Fill in the ratios.

    Args:
        rows: All rows.
        forward: Seconds of a bare forward pass.
    """
    slow = next((row for row in rows if row.engine == HOOKS), None)
    for row in rows:
        row.forward_ratio = row.tests * forward / row.seconds
        if slow is not None:
            row.hooks_ratio = slow.ms_per_test / row.ms_per_test
