"""The run of a search, from a setting to a circuit and its files, whatever the search.

Its phases:

1. Prepare: check what is asked for, make the folder this process's own, and find a journal to continue.
2. Search: the algorithm decides edges; it captures the runs it needs, and keeps its steps.
3. Verify: the hooks engine, which is another one, measures the circuit in FP32 and at the search's precision.
4. Record: what ran, what it took, and the verdict.
5. Save: the circuit's files.

The runs of a sweep take the same phases, and share what they capture (`Bench`).
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from pahq_hf.checkpoint.legacy_fingerprint import known_fingerprint
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.confirmation import warn_unverified
from pahq_hf.circuit.files import (
    CIRCUIT_NAME,
    LOCK_NAME,
    output_path,
    refuse_bootstrap,
    refuse_others_files,
    refuse_overwrite,
    refuse_sweep,
)
from pahq_hf.circuit.run_record import (
    AppliedFacts,
    EdgeCounts,
    NodeCounts,
    PrecisionFacts,
    RunRecord,
    SearchArguments,
    TaskFacts,
)
from pahq_hf.circuit.verdict import announce
from pahq_hf.engine.setting import Setting
from pahq_hf.precision.flags import exact_products
from pahq_hf.precision.memory import PeakMemory
from pahq_hf.precision.threads import threads
from pahq_hf.search.bench import Bench
from pahq_hf.search.checked import checked
from pahq_hf.search.clock import RunClock
from pahq_hf.search.journal import DATA, Journal, check_header, header_of, is_begun
from pahq_hf.search.kind import Found, OptionsT, SearchKind
from pahq_hf.search.lock import RunLock, check_free
from pahq_hf.search.progress import Progress, make_progress
from pahq_hf.search.subject import Subject
from pahq_hf.search.units import Units, units_of
from pahq_hf.search.verification import Judge
from pahq_hf.search.versions import hardware_facts, versions
from pahq_hf.search.work import RunFolder, Work
from pahq_hf.tasks.metrics import check_metric

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Searched:
    """A search that is done, before its circuit is measured.

    Attributes:
        found: What it found.
        engine: What its record says of the engine, and of directions.
    """

    found: Found
    engine: dict[str, Any]


class Run(Generic[OptionsT]):
    """A run of one search.

    Args:
        kind: The search.
        options: What is asked of it.
        subject: The model on its prompts, and how it is computed.
        progress: Say on stderr how far it is.

    Attributes:
        bench: Its captured runs; runs of one setting may be given the same.
        called: What tells it from others in a log, where it is one of several.
        takes_over: Whether it, and runs that are parts of it, take the place of another machine's process.

    Raises:
        MetricError: If the task lacks what the metric needs.
        ConfigError: If an option means nothing for this model, task or precision.
    """

    def __init__(
        self,
        kind: SearchKind[OptionsT],
        options: OptionsT,
        subject: Subject,
        *,
        progress: bool = True,
    ) -> None:
        task = subject.task
        metric = options.metric or task.metric
        check_metric(metric, task)
        self.kind = kind
        self.setting = Setting(subject.model, task, metric, options.ablation, subject.precision)
        self.options = kind.resolved(options, self.setting)
        self.identity = subject.identity
        self.fingerprint = self.identity.fingerprint
        self.clock = RunClock()
        self.limits = subject.limits
        self.lock: RunLock | None = None  # while it has a folder
        self.called = ""
        self.takes_over = False
        self.bench = Bench(self.setting, self.limits, make_progress(progress), self.clock, warns=True)

    @property
    def units(self) -> Units:
        """What it keeps or removes."""
        return units_of(self.options, self.setting.graph)

    @property
    def searched_on(self) -> Bench:
        """Captured runs that its search works with."""
        return self.bench

    @property
    def reporter(self) -> Progress:
        """Who is told how far it is."""
        return self.bench.progress

    def hush(self) -> None:
        """Leave out warnings that another run on nearly the same prompts gives."""
        self.bench.hush()
        self.searched_on.hush()

    def header(self) -> dict[str, Any]:
        """What pins a run: two runs with equal headers make equal decisions."""
        setting = self.setting
        return {
            "model": self.fingerprint,
            "task": setting.task.fingerprint(),
            "dtype": str(setting.model.hf.dtype).removeprefix("torch."),
            "precision": setting.precision.to_dict(),
            "policy_order": list(setting.precision.policy),  # the first match counts; objects have no order
            self.kind.name: self.options.to_dict() | {"metric": setting.metric},
        }

    def data(self) -> dict[str, Any]:
        """What the prompts are, in words; `header` pins them themselves."""
        task = self.setting.task
        return {"name": task.name, "examples": len(task), **task.source}

    def told_header(self) -> dict[str, Any]:
        """The header, and beside it what is said of the prompts when those of two runs differ."""
        return self.header() | {DATA: self.data()}

    @exact_products()
    def run(self, out: str | Path | None = None, *, resume: bool = False, take_over: bool = False) -> Circuit:
        """Take all phases.

        Args:
            out: Folder for the journal and the finished circuit; None keeps everything in memory.
            resume: Continue the run in `out`; a finished one is returned as it is, and where there is
                none one starts.
            take_over: Take the place of another machine's process that works in `out`.

        Returns:
            The circuit.

        Raises:
            RunError: If `out` cannot be written, holds another run, or is in use by another process.

        Warns:
            UnverifiedWarning: If the engine's final metric is not the hooks engine's.
        """
        self.takes_over = take_over
        with threads(self.limits.threads):
            circuit = self._run(None, resume) if out is None else self._run_in(output_path(out), resume)
        warn_unverified(circuit.record.doubt)
        return circuit

    def _run_in(self, folder: Path, resume: bool) -> Circuit:
        """Run in a folder that no other process works in."""
        check_free(folder, take_over=self.takes_over)
        refuse_sweep(folder)
        refuse_others_files(folder)
        if resume:
            self.fingerprint = known_fingerprint(folder, self.setting.model, str(self.fingerprint))
        # A finished one is only read, unless it died over its picture: that is tidied up.
        if not os.path.exists(folder / LOCK_NAME):
            finished = self.finished(folder, resume=resume)
            if finished is not None:
                return finished
        with RunLock(folder, take_over=self.takes_over) as self.lock:
            # Another process may have finished it meanwhile.
            return self.finished(folder, resume=resume) or self._run(folder, resume)

    def _run(self, folder: Path | None, resume: bool) -> Circuit:
        if folder is not None:
            refuse_bootstrap(folder)
        with PeakMemory(self.setting.model.device) as peak:
            searched = self.search(folder, resume=resume)
            circuit = self.conclude(searched, self.bench.judge(), peak)
        if folder is not None:
            self.save(circuit, folder)
        return circuit

    # -- 1. prepare -----------------------------------------------------------------------------------

    def finished(self, folder: Path | None, *, resume: bool) -> Circuit | None:
        """The circuit of a run that is finished already.

        Args:
            folder: The run's folder.
            resume: Whether there may be a run.

        Returns:
            The circuit, or None when something is left to do.

        Raises:
            RunError: If the folder holds another run, or any run when there may be none.
        """
        if folder is None:
            return None
        if resume and os.path.exists(folder / CIRCUIT_NAME):
            circuit = Circuit.from_pretrained(folder)
            check_header(header_of(circuit), self.told_header(), folder)
            self._check_finished(circuit, folder)
            circuit.complete(folder)
            with suppress(OSError):  # one that died over its picture left it; a folder may be read-only
                self.clock.forget(folder)
            return circuit
        if not resume:
            refuse_overwrite(folder, "continue it with --resume or choose another folder")
        return None

    def _check_finished(self, circuit: Circuit, folder: Path) -> None:
        """Check that a finished run's circuit is what its journal says, where that is still there.

        Raises:
            RunError: If it is not, or if the journal is damaged.
        """
        if self.kind.check is None or not is_begun(folder):
            return
        journal = Journal.read(folder)
        if journal is not None:
            check_header(journal.header, self.told_header(), folder)
            self.kind.check(self._work(folder, journal), self.units.found(circuit))

    def _journal(self, folder: Path | None, resume: bool) -> Journal | None:
        """The journal of the run that is continued; None if there is none, or it did not get that far."""
        if folder is None or not resume or not is_begun(folder):
            return None
        journal = Journal.resume(folder, self.told_header())
        self.clock.take_over(folder)
        if not journal.is_sealed:
            logger.warning(
                "%s has no checksums, an earlier version wrote it; its records are consistent", journal.path
            )
        return journal

    def check_lock(self) -> None:
        """Check that the run's folder is still this process's.

        Raises:
            RunError: If another process took it over.
        """
        if self.lock is not None:
            self.lock.check()

    # -- 2. search ------------------------------------------------------------------------------------

    def search(self, folder: Path | None, *, resume: bool) -> Searched:
        """Let the algorithm decide.

        Args:
            folder: Folder of the journal; None keeps none.
            resume: Continue the search whose journal is there.

        Returns:
            What it found.

        Raises:
            RunError: If the folder cannot be written or holds another run.
            ConfigError: If what the search returns can be no circuit.
        """
        work = self._work(folder, self._journal(folder, resume))
        with (
            self.clock.saving(lambda: work.journal_folder, self.check_lock),
            self.clock.phase(self.kind.phase),
        ):
            with self.kind.running():
                returned = self.kind.function(work)
            found = work.units.circuit(checked(returned, work.graph, self.kind.name))
            if found.final is None:
                with self.clock.phase("evaluate"):
                    found = replace(found, final=work.metric_of(found.kept))
        return Searched(found, work.close())

    def _work(self, folder: Path | None, journal: Journal | None) -> Work[OptionsT]:
        place = None
        if folder is not None:
            place = RunFolder(folder, self.header(), self.told_header(), self.check_lock)
        return Work(self.options, self.searched_on, self.clock, place, journal)

    # -- 3. verify, 4. record -------------------------------------------------------------------------

    def conclude(self, searched: Searched, judge: Judge, peak: PeakMemory) -> Circuit:
        """Measure what a search found, and say what ran.

        Args:
            searched: What it found.
            judge: What measures it.
            peak: Memory so far.

        Returns:
            The circuit.
        """
        found, graph = searched.found, self.setting.graph
        with self.clock.phase("evaluate"), self.reporter.phase("verifying"):
            metric, verdict = judge.measure(found.kept, found.final)
            if found.searched is not None:
                edges, kept = graph.all_edges[found.searched], found.kept[found.searched]
                verdict = replace(verdict, searched=int(edges.sum()), searched_kept=int(kept.sum()))
            nodes = NodeCounts.of(found.nodes)
            verdict = replace(verdict, nodes=nodes.kept, nodes_total=nodes.total)
            means, applied = judge.means, judge.applied(found.kept, verdict)
        if found.label is not None:
            announce(verdict, self.called + (found.label or self.kind.name))
        weights, tested = self.setting.model.precision, int(found.tested.sum())
        told = self.kind.told_facts
        facts = found.recordable(told)
        record = RunRecord(
            method=self.kind.name,
            title=self.kind.title,
            ranks_kept_first=self.kind.ranks_kept_first,
            header=self.header(),
            arguments=SearchArguments.from_json(self.options.to_dict() | {"metric": self.setting.metric}),
            precision=PrecisionFacts.from_json(self.setting.precision.to_dict()),
            task=TaskFacts.from_json(self.data()),
            versions=versions() | {"device": str(self.setting.model.device)},
            edges=EdgeCounts(
                total=graph.edge_count,
                tested=tested,
                untested=graph.edge_count - tested,
                kept=verdict.kept,
                live=verdict.live,
            ),
            nodes=nodes,
            apply=AppliedFacts.from_json(applied),
            seconds=self.clock.report(),
            peak_memory={
                "linear_weights": weights.nbytes,
                "linear_weights_fp32": weights.nbytes_fp32,
                **peak.report(),
            },
            metric=metric,
            verified=None if metric.tolerance is None else metric.verified,
            verdict=verdict,
            **hardware_facts(self.setting.model.device),
            **searched.engine,
            **RunRecord.read({name: value for name, value in facts.items() if name in told}),
            more={name: value for name, value in facts.items() if name not in told},
        )
        return Circuit(
            graph,
            found.kept,
            found.scores,
            found.tested,
            self.identity.to_json(),
            record.to_json(),
            means,
            found.estimated,
            found.found_by,
            scored_nodes=found.nodes,
        )

    # -- 5. save --------------------------------------------------------------------------------------

    def save(self, circuit: Circuit, folder: Path) -> None:
        """Write a run's circuit into its folder.

        Raises:
            RunError: If it cannot be written, or another process took it over.
        """
        self.check_lock()
        with self.reporter.phase("saving and drawing"):
            circuit.save_pretrained(folder)
        self.clock.forget(folder)
