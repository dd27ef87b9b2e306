"""One discovery from model and task to circuit: engine, search, journal, evaluation, facts."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pahq_hf
from pahq_hf.checkpoint.legacy_fingerprint import known_fingerprint
from pahq_hf.circuit.ablation import APPLY
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.confirmation import warn_unverified
from pahq_hf.circuit.files import (
    CIRCUIT_NAME,
    JOURNAL_NAME,
    SCREEN_NAME,
    make_folder,
    output_path,
    refuse_overwrite,
)
from pahq_hf.circuit.run_record import MetricFacts
from pahq_hf.circuit.verdict import announce
from pahq_hf.config import ACDCConfig, EngineConfig, MetricName, PAHQConfig, parse_screen
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.greedy_accuracy import warn_near_chance
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.flags import exact_products
from pahq_hf.precision.margin import default_margin
from pahq_hf.precision.memory import PeakMemory
from pahq_hf.precision.threads import threads
from pahq_hf.search.acdc import AdaptiveBatch, BatchSize, FixedBatch, ReaderRecord, Search, search
from pahq_hf.search.attribution.methods import check_gradient
from pahq_hf.search.clock import RunClock
from pahq_hf.search.expectation import search_progress
from pahq_hf.search.hardware import hardware_facts
from pahq_hf.search.journal import DATA, Journal, check_header, check_result
from pahq_hf.search.lock import LOCK_NAME, RunLock, check_free
from pahq_hf.search.progress import make_progress
from pahq_hf.search.screen import Screen, make_screen
from pahq_hf.search.settings import RunSettings
from pahq_hf.search.shared_answers import Answers, RecallingEngine
from pahq_hf.search.verification import Judge
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import check_metric

logger = logging.getLogger(__name__)
_SAID = {"screen": "screening", "capture": "capturing", "evaluate": "verifying"}
_SOURCES = {"sparse": "SparseEngine", "hooks": "HooksEngine"}  # in the keys of the answers that folders hold
_LIBRARIES = ("torch", "transformers", "torchao", "safetensors", "numpy")


@dataclass(frozen=True)
class Found:
    """What a search found, before it is measured.

    Attributes:
        state: The finished search.
        final: The metric of its circuit, by its engine.
        facts: What ran.
    """

    state: Search
    final: float
    facts: dict[str, Any]


class Discovery:
    """A discovery of one circuit.

    Args:
        model: The patched model.
        identity: What identifies the base model, stored with the circuit.
        task: The prompts.
        pahq: The model's precision.
        acdc: The search.
        engine: How metrics are computed.
        progress: Say on stderr how far it is.
    """

    def __init__(
        self,
        model: PatchedModel,
        identity: dict[str, Any],
        task: Task,
        pahq: PAHQConfig,
        acdc: ACDCConfig,
        engine: EngineConfig | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.identity = identity
        self.fingerprint = identity.get("fingerprint")
        self.task = task
        self.pahq = pahq
        self.acdc = with_margin(acdc, pahq)
        self.engine = engine or EngineConfig()
        self.metric: MetricName = acdc.metric or task.metric
        check_metric(self.metric, task)
        self.setting = Setting(model, task, self.metric, acdc.ablation, pahq)
        model.graph.match_readers(acdc.readers)  # a wrong glob fails before any work
        if acdc.screen is not None:
            check_gradient(parse_screen(acdc.screen)[0], self.metric)
        self.screen: Screen | None = None
        self.lock: RunLock | None = None  # while it has a folder
        self.reporter = make_progress(progress)
        self.clock = RunClock()

    def header(self) -> dict[str, Any]:
        """What pins a run: two runs with equal headers make equal decisions."""
        return {
            "model": self.fingerprint,
            "task": self.task.fingerprint(),
            "dtype": str(self.model.hf.dtype).removeprefix("torch."),
            "precision": self.pahq.to_dict(),
            "policy_order": list(self.pahq.policy),  # the first match counts; objects have no order
            "acdc": self.acdc.to_dict() | {"metric": self.metric},
        }

    def data(self) -> dict[str, Any]:
        """What the prompts are, in words; `header` pins them themselves."""
        return {"name": self.task.name, "examples": len(self.task), **self.task.source}

    def told_header(self) -> dict[str, Any]:
        """The header, and beside it what is said of the prompts when those of two runs differ."""
        return self.header() | {DATA: self.data()}

    @exact_products()
    def run(self, out: str | Path | None = None, *, resume: bool = False, take_over: bool = False) -> Circuit:
        """Search, evaluate, and (given `out`) save.

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
        with threads(self.engine.threads):
            circuit = (
                self._run(None, resume) if out is None else self._run_in(output_path(out), resume, take_over)
            )
        warn_unverified(circuit.record.doubt)
        return circuit

    def _run_in(self, folder: Path, resume: bool, take_over: bool) -> Circuit:
        """Run in a folder that no other process works in."""
        check_free(folder, take_over=take_over)
        if resume:
            self.fingerprint = known_fingerprint(folder, self.model, str(self.fingerprint))
        # A finished one is only read, unless it died over its picture: that is tidied up.
        if not os.path.exists(folder / LOCK_NAME):
            finished = self.finished(folder, resume=resume)
            if finished is not None:
                return finished
        with RunLock(folder, take_over=take_over) as self.lock:
            # Another process may have finished it meanwhile.
            return self.finished(folder, resume=resume) or self._run(folder, resume)

    def _run(self, folder: Path | None, resume: bool) -> Circuit:
        with PeakMemory(self.model.device) as peak:
            if not self._is_begun(folder, resume):
                self.screen = self.make_screen()
            with self._phase("capture"):
                engine = self.make_engine()
            found = self.search(engine, folder, resume=resume)
            del engine  # its captured runs make room for the evaluation's
            with self._phase("evaluate"):
                judge = self.judge()
            circuit = self.conclude(found, judge)
        circuit.discovery["peak_memory"] |= peak.report()
        if folder is not None:
            self.save(circuit, folder)
        return circuit

    def save(self, circuit: Circuit, folder: Path) -> None:
        """Write a run's circuit into its folder.

        Raises:
            RunError: If it cannot be written, or another process took it over.
        """
        self.check_lock()
        with self.reporter.phase("saving and drawing"):
            circuit.save_pretrained(folder)
        self.clock.forget(folder)

    def check_lock(self) -> None:
        """Check that the run's folder is still this process's.

        Raises:
            RunError: If another process took it over.
        """
        if self.lock is not None:
            self.lock.check()

    # -- steps, which runs on one model and task may share what they need for -------------------------

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
            found = {**circuit.discovery.get("header", {}), DATA: circuit.discovery.get("task")}
            check_header(found, self.told_header(), folder)
            self._check_finished(circuit, folder)
            return circuit
        if not resume:
            refuse_overwrite(folder, "continue it with --resume or choose another folder")
        return None

    def make_engine(self) -> Engine:
        """An engine for this model, task, metric and precision, its runs captured."""
        return make_engine(self.setting, self.engine)

    def search(
        self,
        engine: Engine,
        folder: Path | None,
        *,
        resume: bool,
        answers: Answers | None = None,
        first: bool = True,
    ) -> Found:
        """Search with an engine, which can begin another search afterwards.

        Args:
            engine: Made for this model, task, metric and precision.
            folder: Folder of the journal; None keeps none.
            resume: Continue the run whose journal is there.
            answers: What the engine answered to other searches; what it did is not computed again.
            first: Whether it is the first search with this engine: what holds for all is said once.

        Returns:
            What was found.

        Raises:
            RunError: If the folder cannot be written or holds another run.
        """
        journal = self._journal(folder, resume, engine)
        resumed = 0 if journal is None else len(journal.records)
        if first:
            warn_near_chance(engine.clean_logits, self.task)
        before = engine.evaluations
        recalling = None if answers is None else RecallingEngine(engine, answers, self._source(engine))
        with self._phase("search"):
            state = self._search(recalling or engine, self._batch(engine), journal)
        final = state.metric
        with self._phase("evaluate"):
            if self.pahq.regime in ("pahq", "pahq-literal"):  # state.metric is of the last component's tests
                try:
                    final = engine.metric_of(state.kept)
                finally:
                    engine.finish()
        facts = self._facts(state, engine) | {"resumed_readers": resumed}
        facts["evaluations"] = engine.evaluations - before
        if recalling is not None:
            facts["reused"] = {
                "evaluations": recalling.recalled,
                "readers": recalling.recalled_readers,
            }
        return Found(state, final, facts)

    def judge(self) -> Judge:
        """What measures the circuits of this model, task, metric and precision."""
        return Judge(self.setting)

    def conclude(self, found: Found, judge: Judge) -> Circuit:
        """Measure what a search found.

        Args:
            found: What it found.
            judge: What measures it.

        Returns:
            The circuit.
        """
        state = found.state
        with self._phase("evaluate"):
            metric, verdict = judge.measure(state.kept, found.final)
            if self.acdc.readers is not None:
                chosen, graph = self.model.graph.match_readers(self.acdc.readers), self.model.graph
                searched, kept = (int(edges[chosen].sum()) for edges in (graph.all_edges, state.kept))
                verdict = replace(verdict, searched=searched, searched_kept=kept)
            means, applied = judge.means, judge.applied(state.kept, verdict)
        facts = found.facts | {APPLY: applied}
        seconds = self.clock.seconds | {"total": sum(self.clock.seconds.values())}
        seconds |= {f"search.{name}": value for name, value in facts.pop("phases").items()}
        facts["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        facts["metric"] = metric
        facts["verified"] = MetricFacts.from_json(metric).verified
        facts["verdict"] = verdict.to_dict()
        announce(verdict, f"tau {self.acdc.threshold:g}")
        return Circuit(
            self.model.graph, state.kept, state.scores, state.tested, dict(self.identity), facts, means
        )

    # -- parts of them ----------------------------------------------------------------------------

    def make_screen(self) -> Screen | None:
        """Score the edges that the search may pass over; None if it tests all.

        Its captured runs are gone afterwards: before an engine is made they make room for the engine's.
        """
        text = self.acdc.screen
        if text is None:
            return None
        with self._phase("screen"):
            return make_screen(text, self.setting, self.engine, self.reporter)

    def _is_begun(self, folder: Path | None, resume: bool) -> bool:
        if folder is None or not resume or not os.path.exists(folder / JOURNAL_NAME):
            return False
        with (folder / JOURNAL_NAME).open("rb") as file:
            return file.readline().endswith(b"\n")  # else it ends within its header

    def _journal(self, folder: Path | None, resume: bool, engine: Engine) -> Journal | None:
        """The run's journal, and its screen: of an interrupted run the one that is kept with it."""
        if folder is None or not self._is_begun(folder, resume):
            self.screen = self.screen or self.make_screen()
        if folder is None:
            return None
        make_folder(folder)
        if self._is_begun(folder, resume):
            journal = Journal.resume(folder, self.told_header())
            self.clock.take_over(folder)
            if self.acdc.screen is not None:
                self.screen = Screen.load(self.acdc.screen, self.model.graph, folder, self.header())
            self._replay(journal, self.screen)
            if not journal.is_sealed:
                logger.warning(
                    "%s has no checksums, an earlier version wrote it; its records are consistent",
                    journal.path,
                )
            return journal
        if self.screen is not None:
            self.screen.save(folder, self.header())
        return Journal.create(folder, self.told_header() | {"settings": self.settings(engine).to_dict()})

    def settings(self, engine: Engine) -> RunSettings:
        """How this run computes."""
        return RunSettings(torch.get_num_threads(), engine.name, str(self.model.device), self.pahq.compute)

    def _replay(self, journal: Journal, screen: Screen | None) -> Search:
        """The state of the search after a journal's records, which are checked."""
        survivors = None if screen is None else screen.survivors
        exact = self.pahq.regime == "fp32"
        return journal.check(self.model.graph, self.acdc, survivors, telescopes=exact)

    def _check_finished(self, circuit: Circuit, folder: Path) -> None:
        """Check that a finished run's circuit is what its journal says, where that is still there.

        Raises:
            RunError: If it is not, or if the journal is damaged.
        """
        lost = self.acdc.screen is not None and not os.path.exists(folder / SCREEN_NAME)
        if lost or not os.path.exists(folder / JOURNAL_NAME):
            return
        journal = Journal.read(folder)
        if journal is None:
            return
        check_header(journal.header, self.told_header(), folder)
        text = self.acdc.screen
        screen = None if text is None else Screen.load(text, self.model.graph, folder, self.header())
        check_result(self._replay(journal, screen), circuit, folder)

    def _source(self, engine: Engine) -> str:
        """What answers depend on to the bit, beside the run's header."""
        return f"{_SOURCES[engine.name]} {torch.__version__} {self.model.device} {torch.get_num_threads()}"

    def _search(self, engine: Engine, batch: BatchSize, journal: Journal | None) -> Search:
        done = [] if journal is None else list(journal.records)
        survivors = None if self.screen is None else self.screen.survivors
        name = f"ACDC, tau {self.acdc.threshold:g}"
        graph, folder = self.model.graph, None if journal is None else journal.path.parent
        said = search_progress(self.reporter, name, graph, self.acdc, survivors, done)
        with said as shown, self.clock.kept(folder, self.check_lock):

            def on_reader(state: Search, record: ReaderRecord) -> None:
                if journal is not None:
                    self.check_lock()
                    journal.append(record)
                    self.clock.keep(journal.path.parent)
                shown.on_reader(state)

            return search(
                engine,
                self.acdc,
                batch=batch,
                done=done,
                survivors=survivors,
                on_reader=on_reader,
                on_batch=lambda _, tested: shown.on_batch(tested),
            )

    def _batch(self, engine: Engine) -> BatchSize:
        if self.engine.batch is not None:
            return FixedBatch(self.engine.batch)
        return AdaptiveBatch() if engine.gains_by_batches else FixedBatch(1)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        said = nullcontext() if name == "search" else self.reporter.phase(_SAID[name])
        with self.clock.phase(name), said:
            yield

    def _facts(self, state: Search, engine: Engine) -> dict[str, Any]:
        graph = self.model.graph
        tested = int(state.tested.sum())
        weights = self.model.precision
        return {
            "method": "acdc",
            "header": self.header(),
            "arguments": self.acdc.to_dict() | {"metric": self.metric},
            "precision": self.pahq.to_dict(),
            "engine": engine.name,
            "settings": self.settings(engine).to_dict(),
            "task": self.data(),
            "versions": versions() | {"device": str(self.model.device)},
            **hardware_facts(self.model.device),
            "edges": {
                "total": graph.edge_count,
                "tested": tested,
                "untested": graph.edge_count - tested,
                "kept": int(state.kept.sum()),
                "live": int(graph.live_edges(state.kept).sum()),
            },
            "second_looks": {
                "margin": self.acdc.to_dict()["margin"],
                "tests": sum(record.looks for record in state.records),
                "changed": sum(record.changed for record in state.records),
            },
            "phases": engine.phases.take(),
            **({} if self.screen is None else {"screen": self.screen.facts()}),
            "peak_memory": {
                "linear_weights": weights.nbytes,
                "linear_weights_fp32": weights.nbytes_fp32,
            },
        }


def with_margin(acdc: ACDCConfig, pahq: PAHQConfig) -> ACDCConfig:
    """The search with the margin of its regime."""
    if pahq.regime == "pahq":
        if acdc.margin is not None:
            return acdc
        formats = {pahq.format, *pahq.policy.values()}
        return replace(acdc, margin=default_margin(formats, pahq.compute))
    if acdc.margin:
        raise ConfigError(f"a margin needs precision pahq: in {pahq.regime} there is no second look")
    return acdc


def versions() -> dict[str, str]:
    """Versions of everything that could change a number."""
    found = {"pahq_hf": pahq_hf.__version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _LIBRARIES}
    return found | {"threads": str(torch.get_num_threads())}
