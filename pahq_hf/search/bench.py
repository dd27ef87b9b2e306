"""What searches of one setting work with: captured runs, made when they are first asked for.

Every run has a bench; the runs of a sweep share one, and with it what they capture.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_circuit_runs, make_engine, make_gradient_runs
from pahq_hf.engine.protocol import CircuitRuns, Engine, GradientRuns
from pahq_hf.engine.setting import Setting
from pahq_hf.evaluation.greedy_accuracy import warn_near_chance
from pahq_hf.evaluation.spelling import warn_of_spelling
from pahq_hf.precision.memory import trim
from pahq_hf.search.clock import RunClock
from pahq_hf.search.progress import Progress, Silence
from pahq_hf.search.shared_answers import EngineCache, RecallingEngine
from pahq_hf.search.verification import Judge
from pahq_hf.tasks.base import Task

T = TypeVar("T")
_CLASSES = {"sparse": "SparseEngine", "hooks": "HooksEngine"}  # as answers in files name them


class Bench:
    """Captured runs of a setting.

    Args:
        setting: Model, task, metric, ablation and precision.
        limits: Which engine computes metrics, and what it may take.
        progress: Who is told what goes on.
        clock: What counts the seconds of capturing.
        answers: What the engine answered to other searches; what it did is not computed again.
        warns: Whether a full model that cannot do the task is told of.
    """

    def __init__(
        self,
        setting: Setting,
        limits: EngineConfig | None = None,
        progress: Progress | None = None,
        clock: RunClock | None = None,
        answers: EngineCache | None = None,
        *,
        warns: bool = False,
    ) -> None:
        self.setting = setting
        self.limits = limits or EngineConfig()
        self.progress = progress or Silence()
        self.clock = clock or RunClock()
        self._answers = answers
        self._warns = warns
        self.is_hushed = False  # whether another run on nearly the same prompts has said all warnings
        self._engine: Engine | None = None
        self._shared: dict[object, Any] = {}

    @property
    def engine(self) -> Engine:
        """The engine, its runs captured."""
        if self._engine is None:
            self._engine = self._captured(self._make_engine)
            self._look_at(self._engine.clean_logits)
        return self._engine

    def _make_engine(self) -> Engine:
        return make_engine(self.setting, self.limits)

    def recalling(self, engine: Engine) -> RecallingEngine | None:
        """The engine for one more search, as far as answers are kept from others; None if none are."""
        if self._answers is None:
            return None
        device, threads = self.setting.model.device, torch.get_num_threads()
        source = f"{_CLASSES[engine.name]} {torch.__version__} {device} {threads}"
        return RecallingEngine(engine, self._answers, source)

    def gradients(self) -> GradientRuns:
        """Runs whose gradients can be taken; they go with whoever asks."""
        runs = self._captured(lambda: make_gradient_runs(self.setting))
        self._look_at(runs.clean.logits)
        return runs

    def circuit_runs(self) -> CircuitRuns:
        """Runs whose gradients can be taken at circuits; they go with whoever asks."""
        return self._captured(lambda: make_circuit_runs(self.setting))

    def on(self, task: Task, *, quiet: bool = False) -> Bench:
        """The bench of the same setting on other prompts; what it captures is its own.

        Args:
            task: The prompts.
            quiet: Whether nobody is told what goes on.
        """
        setting = replace(self.setting, task=task)
        if quiet:
            return Bench(setting, self.limits, clock=self.clock)
        warns, self._warns = self._warns, False
        return Bench(setting, self.limits, self.progress, self.clock, warns=warns)

    def judge(self) -> Judge:
        """What measures the circuits that searches find. The engine makes room for it."""
        self.clear()
        with self.clock.phase("evaluate"), self.progress.phase("verifying"):
            return Judge(self.setting)

    def shared(self, key: object, make: Callable[[], T]) -> T:
        """What the first search of a kind makes, and all others of this bench take."""
        if key not in self._shared:
            self._shared[key] = make()
        found: T = self._shared[key]
        return found

    def hush(self) -> None:
        """Leave out warnings that another run on nearly the same prompts gives."""
        self._warns, self.is_hushed = False, True

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count the seconds inside under a name."""
        return self.clock.phase(name)

    def clear(self) -> None:
        """Let the captured runs go."""
        self._engine = None
        trim()

    def _captured(self, make: Callable[[], T]) -> T:
        with self.clock.phase("capture"), self.progress.phase("capturing"):
            return make()

    def _look_at(self, logits: torch.Tensor) -> None:
        if self._warns:
            warn_near_chance(logits, self.setting.task)
            warn_of_spelling(logits, self.setting.task)
            self._warns = False
