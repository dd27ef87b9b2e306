"""An engine's work with less memory than it takes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pahq_hf import EngineConfig, PAHQModel, Task
from pahq_hf.capture.recording import capture
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.setting import Setting
from tests.pretend.scenario import Answer, Scenario
from tests.pretend.tensor import MACHINE

WORK = ("recording", "capture", "begin", "focus", "batch", "slopes", "look", "decision", "next focus")


class _Steps:
    """Takes an engine through the work of a search on one reader; memory is short in one step of it.

    Args:
        scenario: What is run.
        model: The model.
        task: The prompts.
        room: Bytes for that step; None to find out what it takes.
    """

    def __init__(self, scenario: Scenario, model: PAHQModel, task: Task, room: int | None) -> None:
        self._during, self._room = scenario.during, room
        self.need = self.lasting = 0
        self.values: list[float] = []
        graph = model.graph
        # The one in focus, and the one after it.
        reader = graph.reader_index(f"m{graph.spec.layers // 2}")
        following = graph.reader_index("a1.h0<q>")
        edges = list(graph.in_edges(reader))
        candidates = [edges[: k + 1] for k in range(0, len(edges), 2)]
        config, metric = EngineConfig(**scenario.engine), scenario.search.get("metric", "kl")
        with self._short("recording"):
            recorded = capture(model.patched, task, task.clean_ids)
        self.values += recorded.final_out.flatten().tolist()
        recorded = None  # type: ignore[assignment]
        with self._short("capture"):
            setting = Setting(model.patched, task, metric, "corrupted", model.pahq_config)
            engine = make_engine(setting, config)
        with self._short("begin"):
            self.values.append(engine.begin(graph.all_edges.copy()))
        with self._short("focus"):
            self._note(engine.focus(reader))
        with self._short("batch"):
            trial = engine.try_(reader, candidates)
        self.values += trial.values
        with self._short("slopes"):
            slopes = engine.slopes(reader, candidates, edges)
        self.values += [*slopes.trial.values, *slopes.effects.flatten().tolist(), *slopes.sizes.tolist()]
        with self._short("look"):
            self.values += engine.look_again(reader, candidates[:4]).values
        with self._short("decision"):
            engine.accept(trial, 2)
            self.values += engine.try_(reader, [edges[:6]]).values
            engine.cut(reader, edges[:3])
            self.values += engine.try_(reader, [edges[:3] + edges[5:6]]).values
        with self._short("next focus"):
            self._note(engine.focus(following))
        self.values += engine.try_(following, [[0]]).values
        engine.finish()

    def _note(self, value: float | None) -> None:
        if value is not None:
            self.values.append(value)

    @contextmanager
    def _short(self, step: str) -> Iterator[None]:
        if step != self._during:
            yield
            return
        memory = MACHINE.memory
        gc.collect()  # else what an earlier scenario left goes meanwhile, and the step seems to take less
        memory.peak = before = memory.now
        memory.capacity = None if self._room is None else before + self._room
        try:
            yield
        finally:
            memory.capacity = None
        self.need, self.lasting = memory.peak - before, memory.now - before


def run(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    """What an engine answers, with a share of the memory that one step takes without a bound."""
    steps = _Steps(scenario, model, task, None)
    if model.patched.device == MACHINE.device:
        # What is captured, and anchors of the hooks engine, have to fit whatever is done.
        stays = scenario.during in ("recording", "capture") or scenario.engine.get("engine") == "hooks"
        least = max(0, steps.lasting) if stays else 0
        room = int(least + scenario.capacity * (steps.need - least))
        steps = _Steps(scenario, model, task, room)
        assert steps.need > room, "it did not run out"
    return Answer(np.zeros(1), np.array(steps.values), {"steps": len(steps.values)})
