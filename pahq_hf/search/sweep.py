"""ACDC at several thresholds: one run that computes once what the searches have in common.

The model, the engine's captured runs, the evaluation's captured runs, and every search's common beginning
with another one (`search/shared_answers.py`) are shared. What comes out is, to the bit, what a run per
threshold would find: batches depend on decisions alone, so values are computed side by side with the same
others. Only where memory runs short do batches depend on what is free; then scores may differ in their last
bits, as those of any two runs may.

How much is shared depends on how early decisions differ, and the first edge with a score between two
thresholds is where they do. What is always shared is starting, loading and capturing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

from pahq_hf.checkpoint.legacy_fingerprint import known_fingerprint
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.files import (
    ANSWERS_NAME,
    LOCK_NAME,
    SWEEP_PREFIX,
    make_folder,
    output_path,
    refuse_others_files,
    refuse_run,
    refuse_sweep,
)
from pahq_hf.errors import ConfigError, RunError
from pahq_hf.precision.flags import exact_products
from pahq_hf.precision.memory import PeakMemory
from pahq_hf.precision.threads import threads
from pahq_hf.search.bench import Bench
from pahq_hf.search.clock import RunClock
from pahq_hf.search.journal import DATA, check_header
from pahq_hf.search.kind import OptionsT, SearchKind
from pahq_hf.search.lock import RunLock, check_free
from pahq_hf.search.pipeline import Run, Searched
from pahq_hf.search.shared_answers import EngineCache
from pahq_hf.search.subject import Subject
from pahq_hf.search.sweep_result import SWEEP_NAME, Sweep, check_thresholds, threshold_folder
from pahq_hf.search.verification import Judge
from pahq_hf.search.versions import hardware_facts, versions


class SweepRun(Generic[OptionsT]):
    """One sweep.

    Args:
        kind: The search; its options have a `threshold`.
        options: What is asked of it, but for the thresholds.
        thresholds: Values of tau.
        subject: The model on its prompts, and how it is computed.
        progress: Say on stderr how far it is.

    Raises:
        ConfigError: If a threshold is no number >= 0 or given twice, an option contradicts the precision,
            or no reader matches; or if the search knows no threshold.
        MetricError: If the task lacks what the metric needs.
    """

    def __init__(
        self,
        kind: SearchKind[OptionsT],
        options: OptionsT,
        thresholds: Sequence[float],
        subject: Subject,
        *,
        progress: bool = True,
    ) -> None:
        if "threshold" not in kind.fields:
            raise ConfigError(f"search {kind.name!r} has no threshold to sweep over")
        direction = kind.direction_of(options)
        if direction != "noising":
            raise ConfigError(f"a sweep is by noising: give direction {direction} to one search at a time")
        self._kind = kind
        self._runs = {
            tau: Run(kind, kind.with_option(options, "threshold", tau), subject, progress=progress)
            for tau in check_thresholds(thresholds)
        }
        self._any = next(iter(self._runs.values()))

    def header(self) -> dict[str, Any]:
        """What pins a sweep: a run's header without its threshold."""
        header = self._any.header()
        own = {name: value for name, value in header[self._kind.name].items() if name != "threshold"}
        return header | {self._kind.name: own}

    def _told_header(self) -> dict[str, Any]:
        return self.header() | {DATA: self._any.data()}

    @exact_products()
    def run(self, out: str | Path | None = None, *, resume: bool = False, take_over: bool = False) -> Sweep:
        """Search at every threshold, evaluate, and (given `out`) save.

        All searches come before the first evaluation, so that no more captured runs are in memory at
        once than in a single discovery.

        Args:
            out: Folder of the sweep; None keeps everything in memory.
            resume: Continue the sweep in `out`, or add thresholds to it; a finished one is returned as
                it is, and where there is none one starts.
            take_over: Take the place of another machine's process that works in `out`.

        Returns:
            The circuits.

        Raises:
            RunError: If `out` cannot be written, holds a sweep already, or is in use by another process.

        Warns:
            UnverifiedWarning: For each search whose final metric is not the hooks engine's.
        """
        with threads(self._any.limits.threads):
            if out is None:
                sweep = self._run(None, resume, take_over)
            else:
                sweep = self._run_in(output_path(out), resume, take_over)
        sweep.warn_unverified()
        return sweep

    def _run_in(self, folder: Path, resume: bool, take_over: bool) -> Sweep:
        """Run in a folder that no other process works in."""
        check_free(folder, take_over=take_over)
        refuse_run(folder)
        refuse_others_files(folder)
        if resume:
            known = known_fingerprint(folder, self._any.setting.model, str(self._any.fingerprint))
            for run in self._runs.values():
                run.fingerprint = known
        # A finished one is only read, unless it died over its plots: that is tidied up.
        if not os.path.exists(folder / LOCK_NAME):
            finished = self._look_into(folder, resume)
            if finished is not None:
                return finished
        with RunLock(folder, take_over=take_over):
            # Another process may have finished it meanwhile.
            return self._look_into(folder, resume) or self._run(folder, resume, take_over)

    def _run(self, folder: Path | None, resume: bool, take_over: bool) -> Sweep:
        folders = {tau: None if folder is None else threshold_folder(folder, tau) for tau in self._runs}
        bench = self._share(EngineCache() if folder is None else self._answers(folder))
        found: dict[float, Circuit] = {}
        for tau, run in self._runs.items():
            circuit = run.finished(folders[tau], resume=resume)
            if circuit is not None:
                found[tau] = circuit
        left = {tau: folders[tau] for tau in self._runs if tau not in found}
        with ExitStack() as locks, PeakMemory(bench.setting.model.device) as peak:
            for tau, own in left.items():
                if own is not None:  # `discover` takes it for a run of its own
                    self._runs[tau].lock = locks.enter_context(RunLock(own, take_over=take_over))
            # In any order all make the same tests together; the smallest circuits are found soonest.
            searched = {
                tau: self._runs[tau].search(left[tau], resume=resume) for tau in sorted(left, reverse=True)
            }
            if searched:
                judge = bench.judge()
                for tau, result in searched.items():
                    found[tau] = self._conclude(tau, result, judge, peak, folders[tau])
        seconds = {"capture": bench.clock.seconds.get("capture", 0.0)}
        if searched:
            seconds["judge"] = bench.clock.seconds["evaluate"]
        facts = {
            "header": self.header(),
            "versions": versions() | {"device": str(bench.setting.model.device)},
            **hardware_facts(bench.setting.model.device),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "peak_memory": peak.report(),
        }
        sweep = Sweep(found, facts)
        if folder is not None:
            with bench.progress.phase("drawing"):
                sweep.save(folder)
        return sweep

    def _share(self, answers: EngineCache) -> Bench:
        """Give all runs one bench; what it captures is no search's own."""
        own = self._any.bench
        bench = Bench(own.setting, own.limits, own.progress, RunClock(), answers, warns=True)
        for run in self._runs.values():
            run.bench = bench
        return bench

    def _conclude(
        self, tau: float, searched: Searched, judge: Judge, peak: PeakMemory, folder: Path | None
    ) -> Circuit:
        circuit = self._runs[tau].conclude(searched, judge, peak)
        record = circuit.record
        kl = record.metric.fp32 if record.metric.name == "kl" else judge.evaluator.report(circuit)["kl"]
        circuit.discovery = replace(record, kl=kl).to_json()
        if folder is not None:
            self._runs[tau].save(circuit, folder)
        return circuit

    # -- files ------------------------------------------------------------------------------------

    def _look_into(self, folder: Path, resume: bool) -> Sweep | None:
        """The sweep in a folder, if it is this one and finished.

        Raises:
            RunError: If the folder holds a sweep already, or any when there may be none.
        """
        if not resume:
            refuse_sweep(folder, "continue it with --resume or choose another folder")
        wanted = {threshold_folder(folder, tau).name for tau in self._runs}
        for path in sorted(folder.iterdir()) if os.path.isdir(folder) else ():
            if path.name.startswith(SWEEP_PREFIX) and path.name not in wanted:
                tau = path.name.removeprefix(SWEEP_PREFIX)
                raise RunError(
                    f"{folder} holds a sweep with threshold {tau}; ask for that too or choose another folder"
                )
        if not os.path.exists(folder / SWEEP_NAME):
            return None
        sweep = Sweep.from_pretrained(folder)
        told = next((circuit.record.task.to_json() for circuit in sweep.values()), None)
        check_header({**sweep.facts.get("header", {}), DATA: told}, self._told_header(), folder)
        return sweep if set(sweep) == set(self._runs) else None

    def _answers(self, folder: Path) -> EngineCache:
        make_folder(folder)
        return EngineCache.open(folder / ANSWERS_NAME, self._told_header())
