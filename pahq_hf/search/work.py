"""What a search is given: what is asked for, an engine, and a journal of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from pahq_hf.circuit.files import CIRCUIT_NAME, JOURNAL_NAME, make_folder
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.circuit.run_record import Reused
from pahq_hf.config import EngineConfig, EngineName
from pahq_hf.engine.protocol import CircuitRuns, Engine, GradientRuns
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError, RunError
from pahq_hf.search.bench import Bench
from pahq_hf.search.clock import RunClock
from pahq_hf.search.journal import Journal, Step, damaged
from pahq_hf.search.kind import OptionsT
from pahq_hf.search.progress import Progress
from pahq_hf.search.settings import RunSettings
from pahq_hf.search.shared_answers import RecallingEngine
from pahq_hf.search.units import Units, units_of
from pahq_hf.tasks.base import Task

T = TypeVar("T")


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its journal.

    Attributes:
        path: The folder.
        header: What pins the run.
        told: The same with what is said of its prompts.
        check: Raises `RunError` if the folder has become another process's.
    """

    path: Path
    header: Mapping[str, Any]
    told: Mapping[str, Any]
    check: Callable[[], None]


class Work(Generic[OptionsT]):
    """One search at work.

    Args:
        options: What is asked for.
        bench: The captured runs, which may be other searches' too.
        clock: What counts the run's seconds.
        place: Where its journal is; None keeps none.
        journal: The journal of an earlier part, which is continued.

    Attributes:
        options: What is asked for.
        setting: Model, task, metric, ablation and precision.
        limits: Which engine computes metrics, and what it may take.
        units: What it keeps or removes: its graph, engines and gradients are of these.
        progress: Who is told how far it is.
        steps: What an earlier part of an interrupted run kept, in order; empty for a new one.
        is_begun: Whether there was such a part.
        is_hushed: Whether another run on nearly the same prompts gives the warnings.
    """

    def __init__(
        self,
        options: OptionsT,
        bench: Bench,
        clock: RunClock,
        place: RunFolder | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.options = options
        self.setting: Setting = bench.setting
        self.limits: EngineConfig = bench.limits
        self.units: Units = units_of(options, bench.setting.graph)
        self.progress: Progress = bench.progress
        self.is_begun = journal is not None
        self.is_hushed = bench.is_hushed
        self._bench = bench
        self._clock = clock
        self._place = place
        self._own: Engine | None = None  # computes what is not known
        self._recalling: RecallingEngine | None = None
        self._engine: Engine | None = None  # what the search asks: one of the two
        self._before = 0  # values that the engine had computed for others
        self._elsewhere = 0  # values that engines of some of the prompts have computed
        self._named: EngineName | None = None  # what they are called
        self._journal = journal
        self._got_on = False
        self.steps: Sequence[Step] = () if journal is None else tuple(journal.steps)
        self._open: list[Engine] = []  # of some of the prompts, in use now
        clock.count_by(self._counts)

    @property
    def graph(self) -> Graph:
        """The graph of what is kept or removed: the model's, where that is edges."""
        return self.units.graph

    # -- what computes --------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """What computes metrics; its runs are captured when it is first asked for."""
        if self._engine is None:
            with self._clock.elsewhere():
                own = self._bench.engine
            if self._bench.clock is not self._clock:
                own.phases.take()  # capturing is no search's own
            self._clock.watch("search", own.phases)
            self._before = own.evaluations
            self._recalling = self._bench.recalling(own)
            self._own, self._engine = own, self.units.engine(self._recalling or own)
            self._begin()
        return self._engine

    @contextmanager
    def engine_on(self, task: Task) -> Iterator[Engine]:
        """What computes metrics of some of the prompts; it is gone afterwards, and its evaluations count.

        Args:
            task: The prompts.
        """
        with self._clock.elsewhere():
            bench = self._bench.on(task)
            engine = bench.engine
        if self._bench.clock is not self._clock:
            engine.phases.take()  # capturing is no search's own
        self._clock.watch("search", engine.phases)
        self._named = self._named or engine.name
        self._open.append(engine)
        try:
            yield self.units.engine(engine)
        finally:
            self._open.remove(engine)
            self._elsewhere += engine.evaluations
            del engine
            bench.clear()

    def gradients(self) -> GradientRuns:
        """Runs of the task whose gradients can be taken, captured now."""
        with self._clock.elsewhere():
            return self._bench.gradients()

    def circuit_runs(self, task: Task) -> CircuitRuns:
        """Runs of some prompts whose gradients can be taken at circuits, captured now and quietly."""
        with self._clock.elsewhere():
            return self.units.circuit_runs(self._bench.on(task, quiet=True).circuit_runs())

    def shared(self, key: object, make: Callable[[], T]) -> T:
        """What the first search of a sweep makes, and all its others take."""
        return self._bench.shared(key, make)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count the seconds inside under a name of their own."""
        return self._clock.phase(name)

    # -- what is kept ---------------------------------------------------------------------------------

    @property
    def folder(self) -> Path | None:
        """Where files can be kept that a continued search needs; None if nothing is written."""
        return None if self._place is None else make_folder(self._place.path)

    @property
    def header(self) -> Mapping[str, Any]:
        """What pins the run: what is kept in its folder says whose it is."""
        return {} if self._place is None else self._place.header

    def keep(self, step: Mapping[str, Any]) -> None:
        """Put a step into the journal; it is on disk when this returns, and in `steps` of who continues.

        Args:
            step: JSON-ready. Its `check` is the journal's own.

        Raises:
            ConfigError: If it has a `check`.
            RunError: If it cannot be written, or another process took the folder over.
        """
        if "check" in step:
            raise ConfigError("a step cannot have a 'check': so the journal calls the checksum of its line")
        self._begin()
        if self._journal is not None and self._place is not None:
            self._place.check()
            self._journal.append(step)
            self._clock.keep(self._place.path)

    def damaged(self, number: int, reason: str) -> RunError:
        """The error that one of `steps` is none of this search's.

        Args:
            number: Which one; the first is 1.
            reason: What is wrong with it.
        """
        assert self._journal is not None
        return damaged(self._journal.path, f"record {number} on line {number + 1}{reason}")

    def other_circuit(self) -> RunError:
        """The error that a finished run's circuit is not what its steps end at."""
        assert self._place is not None
        return RunError(
            f"the circuit in {self._place.path} is not the one its {JOURNAL_NAME} tells of: one of them was "
            f"changed; remove {CIRCUIT_NAME} and --resume to make it again from the journal"
        )

    def _begin(self) -> None:
        """Start the journal, if there is to be one."""
        self._got_on = True
        if self._journal is None and self._place is not None:
            folder = make_folder(self._place.path)
            settings = self.run_settings
            if settings.engine is None:  # not used yet: the one asked for, which a continued run takes
                settings = replace(settings, engine=self.limits.engine)
            self._journal = Journal.create(folder, {**self._place.told, "settings": settings.to_dict()})

    # -- for the pipeline -----------------------------------------------------------------------------

    @property
    def run_settings(self) -> RunSettings:
        """How the run computes."""
        setting = self.setting
        engine = self._name
        device, compute = str(setting.model.device), setting.precision.compute
        return RunSettings(torch.get_num_threads(), engine, device, compute)

    @property
    def _name(self) -> EngineName | None:
        """What its engines are called; None if it had none."""
        return self._named if self._own is None else self._own.name

    @property
    def journal_folder(self) -> Path | None:
        """The folder, where a journal is in it and this part of the run has got somewhere."""
        return None if self._journal is None or not self._got_on else self._journal.path.parent

    def metric_of(self, kept: BoolArray) -> float | None:
        """The metric of a circuit of edges by the search's engine; None if it had none."""
        if self._own is None:
            return None
        try:
            return self._own.metric_of(kept)
        finally:
            self._own.finish()

    def _counts(self) -> dict[str, int]:
        """Values that were computed for this part of the run, and those that another search had computed."""
        own = 0 if self._own is None else self._own.evaluations - self._before
        computed = own + self._elsewhere + sum(engine.evaluations for engine in self._open)
        found = {"evaluations": computed} if computed else {}
        if self._recalling is not None:
            found |= {"reused": self._recalling.recalled, "reused_readers": self._recalling.recalled_readers}
        return found

    def close(self) -> dict[str, Any]:
        """Let the engine go.

        Returns:
            What the run's record says of it: nothing if there was none.
        """
        self._clock.release()
        own, recalling = self._own, self._recalling
        facts: dict[str, Any] = {"settings": self.run_settings.to_dict()}
        counts = self._clock.counts  # of earlier parts too
        if own is not None or self._named is not None:
            facts |= {"engine": self._name, "evaluations": counts.get("evaluations", 0)}
        if recalling is not None:
            facts["reused"] = Reused(evaluations=counts["reused"], readers=counts["reused_readers"])
        self._own = self._recalling = self._engine = None
        return facts
