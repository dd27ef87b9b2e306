"""The sparse engine: one edge test costs what the edge can change.

While reader r is tested, a search has removed nothing upstream of it, so upstream activations are those of
the clean run; downstream only nodes reached through kept edges can change. The phases of a run, by the names
under which their seconds are counted:

1. capture: the clean and the corrupted run, once (`captured`).
2. refresh: when a reader comes into focus, what its edges can change under the current circuit (`state`).
3. node: how its input changes in each candidate (`focus`).
4. propagation: that change on its way up, through live nodes only (`propagation`).
5. metric: from the last stream, without logits over the vocabulary (`readout`).
6. second look: 3 to 5 in FP32, for edges next to the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture.store import ActivationStore, MemoryStore
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.config import Ablation, EngineName
from pahq_hf.engine.phases import Phases
from pahq_hf.engine.protocol import Slopes, Trial
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.session import Session, in_session
from pahq_hf.engine.sparse.arithmetic import Direct
from pahq_hf.engine.sparse.budget import MemoryBudget
from pahq_hf.engine.sparse.buffers import Buffers
from pahq_hf.engine.sparse.captured import Captured
from pahq_hf.engine.sparse.each import change_each
from pahq_hf.engine.sparse.focus import Focus
from pahq_hf.engine.sparse.measuring import Measuring
from pahq_hf.engine.sparse.positions import TokenPlan
from pahq_hf.engine.sparse.raised import RaisedNode
from pahq_hf.engine.sparse.readout import Readout
from pahq_hf.engine.sparse.state import CircuitState
from pahq_hf.engine.sparse.states import floor_of, new_state
from pahq_hf.engine.task_runs import TaskRuns
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.device_memory import as_many_as_fit, memory_for, until_it_fits
from pahq_hf.tasks.base import Task

T = TypeVar("T")


class SparseEngine:
    """Computes only what an edge can change.

    Args:
        model: The patched model.
        task: The prompts.
        metric: What to minimise.
        ablation: What stands in for removed edges.
        rule: How low precision is used.
        memory_budget: Bytes that a batch of candidates and decoded weights may take; a share of what
            is free by default.
        store: Where captured activations go; memory by default.
        liveness: Compute nodes only at tokens that matter; False computes all tokens, for tests.
    """

    name: EngineName = "sparse"
    gains_by_batches = True

    def __init__(
        self,
        model: PatchedModel,
        task: Task,
        metric: str,
        *,
        ablation: Ablation = "corrupted",
        rule: RegimeRule | None = None,
        memory_budget: int | None = None,
        store: ActivationStore | None = None,
        liveness: bool = True,
    ) -> None:
        self.model = model
        self.task = task
        self.graph: Graph = model.graph
        self.phases = Phases()
        self._rule = rule = rule or RegimeRule()
        store = store or MemoryStore()
        self._memory = MemoryBudget(memory_budget, model)
        self.session = Session(model, rule)
        room = memory_for("what the sparse engine keeps of the clean run", model.device)
        with self.phases("capture"), torch.no_grad(), self.session(), rule.exactly(model), room:
            self._memory.bound(model.precision)
            runs = TaskRuns.of(model, task, metric, ablation, rule, store)
            clean, corrupted, substitute = runs.clean, runs.corrupted, runs.substitute
            # Without anchors raising a component changes it at every token, also before the prompts differ.
            from_start = ablation != "corrupted" or (rule.raise_active and not rule.anchored)
            plan = (
                TokenPlan.of(task, from_start=from_start, device=model.device)
                if liveness
                else TokenPlan.everywhere(task, model.device)
            )
            self.metric, self.clean_logits = runs.metric, clean.logits
            copies = self._memory.vocabulary_copies
            readout = Readout(self.metric, model, clean, copies=copies)
            self._captured = Captured(model, plan, clean, substitute, store)
        self._plan = plan
        self._raised = RaisedNode(
            model,
            rule,
            self._captured,
            corrupted,
            substitute,
            self._fitting,
            fixed=ablation != "corrupted",
        )
        self._new_state = partial(new_state, model, rule, self._captured, clean, len(task))
        self._buffers = Buffers(clean.embedding)
        self._measuring = Measuring(model, self.metric, readout, self._memory, self._buffers, self.phases)
        self._kept = self.graph.all_edges.copy()
        self._state: CircuitState | None = None  # that of the current circuit, when it is needed
        self._focus: Focus | None = None

    @property
    def evaluations(self) -> int:
        """Metric values computed so far."""
        return self._measuring.evaluations

    # -- any circuit ------------------------------------------------------------------------------

    @in_session
    @torch.no_grad()
    def metric_of(self, kept: BoolArray) -> float:
        """The minimised metric of a circuit, from the live nodes only."""
        with self._raised.lowered(self._state):
            return self._fitting(lambda: self._measured(kept, floor_of(self.graph, kept))[1])

    @in_session
    @torch.no_grad()
    def drop_each(self, kept: BoolArray, edges: BoolArray | None = None) -> NDArray[np.float64]:
        """What removing each edge of a circuit alone adds to the metric.

        The whole circuit is computed once; of each removal only what it changes.

        Args:
            kept: The circuit. [readers, writers]
            edges: Which of its edges are asked for; all by default. [readers, writers]

        Returns:
            m(C without the edge) - m(C), 0 elsewhere. [readers, writers]
        """
        with self._raised.lowered(self._state):
            # Of a finished circuit every node may differ from the clean run.
            state, before = self._fitting(lambda: self._measured(kept, 1))
            some = kept if edges is None else edges
            return change_each(state, some, -1.0, before, self._measuring, self._memory, self._fitting)

    @in_session
    @torch.no_grad()
    def add_each(self, kept: BoolArray, absent: BoolArray) -> NDArray[np.float64]:
        """What adding each of some edges alone to a circuit adds to the metric.

        The circuit is computed once, with what the edges would carry; of each addition only what it changes.

        Args:
            kept: The circuit. [readers, writers]
            absent: Edges that are not in it. [readers, writers]

        Returns:
            m(C with the edge) - m(C), 0 elsewhere. [readers, writers]
        """
        with self._raised.lowered(self._state):
            state, before = self._fitting(lambda: self._measured(kept, 1, absent))
            return change_each(state, absent, 1.0, before, self._measuring, self._memory, self._fitting)

    def _measured(
        self, kept: BoolArray, floor: int, candidates: BoolArray | None = None
    ) -> tuple[CircuitState, float]:
        """The state of a circuit and its metric, from the captured runs."""
        state = self._new_state()
        state.update(kept, floor, candidates=candidates)
        return state, self._measuring.metric_of(state)

    # -- memory -----------------------------------------------------------------------------------

    def _fitting(self, work: Callable[[], T]) -> T:
        """What some work gives; when memory runs out, again with less kept for speed, at last with nothing.

        Raises:
            OutOfMemoryError: If it does not fit then either.
        """
        return until_it_fits(work, self._give_way, "the circuit under search", self.model.device)

    def _give_way(self) -> bool:
        if self._focus is not None:
            self._focus.forget()
        self._captured.forget()
        self._buffers.clear()
        reads_less = self._measuring.give_way()
        more = self._memory.give_way() or reads_less
        self._captured.terms = self._memory.together(len(self._plan.window))
        self.model.precision.release()
        self._memory.bound(self.model.precision)
        return more

    # -- the current circuit ------------------------------------------------------------------------

    @in_session
    @torch.no_grad()
    def begin(self, kept: BoolArray) -> float:
        """Make an edge set the current circuit; its metric."""
        self._kept = kept.copy()
        state = self._restart()
        return self._fitting(lambda: self._measuring.metric_of(state))

    def _restart(self) -> CircuitState:
        """Compute the current circuit anew."""
        self._focus = None
        self.model.precision.deactivate()
        self._memory.bound(self.model.precision)  # `finish` ended that
        self._state = None
        state = self._new_state()
        self._fitting(lambda: state.update(self._kept, floor_of(self.graph, self._kept)))
        self._state = state
        return state

    @in_session
    @torch.no_grad()
    def focus(self, reader: int) -> float | None:
        """Turn to a reader; the metric measured again when that changed what tests start from."""
        self._focus = None
        state = self._state or self._restart()
        changed = self._raised.turn_to(reader, state)
        with self.phases("refresh"):
            candidates = self.graph.no_edges()
            candidates[reader] = self.graph.all_edges[reader]
            floor = self._floor(reader)
            self._fitting(lambda: state.update(self._kept, floor, changed, candidates))
        gone = np.flatnonzero(self.graph.all_edges[reader] & ~self._kept[reader]).tolist()
        self._focus = Focus(
            reader, gone, state, self._memory, self._buffers, self._writer_precision, self._fitting
        )
        if not changed and not self._rule.anchored:
            return None
        return self._fitting(lambda: self._measuring.metric_of(state))

    def _floor(self, reader: int) -> int:
        """First node that changes with a reader's input, or differs from the clean run already."""
        nodes = self.graph.readers[reader].nodes
        floor = nodes[0] if nodes else len(self.graph.writers)
        if nodes and self.graph.readers[reader].kind != "mlp":
            floor = self.graph.head_writer(self.graph.readers[reader].layer, 0)
        return min(floor, floor_of(self.graph, self._kept))  # a search has removed nothing further down

    def _writer_precision(self) -> AbstractContextManager[None]:
        """The precision of what tested edges carry."""
        return self.model.precision.full_precision() if self._rule.full_writers else nullcontext()

    def _focused(self, reader: int) -> tuple[Focus, CircuitState]:
        """The reader in focus, and the state it is tested from; turns to it if another one is."""
        if self._focus is None or self._focus.reader != reader:
            self.focus(reader)
        assert self._focus is not None and self._state is not None
        return self._focus, self._state

    @in_session
    @torch.no_grad()
    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Metric with exactly each candidate's edges into `reader` gone.

        Candidates are computed side by side as far as memory allows; when it runs out, in halves.

        Raises:
            OutOfMemoryError: If one candidate does not fit either.
        """
        focus, state = self._focused(reader)
        values: list[float] = []
        while len(values) < len(candidates):
            values += self._fitting(partial(self._try_some, focus, state, candidates[len(values) :]))
        return Trial.of(reader, candidates, values)

    def _try_some(
        self, focus: Focus, state: CircuitState, candidates: Sequence[Sequence[int]]
    ) -> list[float]:
        """Metrics of the first candidates, as many as fit."""

        def attempt(size: int) -> list[float]:
            with self.phases("node"):
                delta = focus.changes(candidates[:size])
            return self._measuring.metrics(state, focus.reader, delta, state.arithmetic, focus.nbytes)

        return as_many_as_fit(
            partial(self._let_go, focus),
            lambda: min(focus.together, len(candidates)),
            self._memory.halve_together,
            attempt,
        )

    def _let_go(self, focus: Focus) -> None:
        """After memory ran out: forget what can be made again."""
        focus.forget()
        self._buffers.clear()

    @in_session
    @torch.no_grad()
    def slopes(self, reader: int, candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Slopes:
        """How the metric moves, to first order, as edges into `reader` go, where each candidate's are gone.

        Forwards and backwards through live nodes at live tokens, along kept edges.

        Raises:
            MetricError: If the metric has no gradient.
            OutOfMemoryError: If one candidate does not fit.
        """
        self.metric.check_gradient()
        focus, state = self._focused(reader)
        values: list[float] = []
        effects: list[Tensor] = []
        while len(values) < len(candidates):
            rest = candidates[len(values) :]
            more, moved = self._fitting(partial(self._follow_some, focus, state, rest, writers))
            values += more
            effects.append(moved)
        found = torch.cat(effects).cpu().numpy()  # [candidates, writers]
        sizes = self._fitting(lambda: focus.sizes(writers)).numpy()
        return Slopes(Trial.of(reader, candidates, values), tuple(writers), found, sizes)

    def _follow_some(
        self, focus: Focus, state: CircuitState, candidates: Sequence[Sequence[int]], writers: Sequence[int]
    ) -> tuple[list[float], Tensor]:
        """Metrics and slopes of the first candidates, as many as fit."""

        def follow(size: int) -> tuple[list[float], Tensor]:
            with self.phases("node"):
                delta = focus.changes(candidates[:size])
            values, gradients = self._measuring.followed(state, focus.reader, delta, state.arithmetic)
            with self.phases("node"):
                return values, focus.effects(gradients, writers)

        return as_many_as_fit(
            partial(self._let_go, focus),
            lambda: min(self._memory.followed(state, focus.reader), focus.together, len(candidates)),
            self._memory.halve,
            follow,
        )

    @in_session
    @torch.no_grad()
    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """The same in FP32.

        Weights along the affected path are read from the checkpoint.
        """
        focus, state = self._focused(reader)
        with self.phases("second look"), self.model.precision.full_precision():
            values = self._fitting(partial(self._look, focus, state, candidates))
        return Trial.of(reader, candidates, values)

    def _look(self, focus: Focus, state: CircuitState, candidates: Sequence[Sequence[int]]) -> list[float]:
        delta = focus.changes_from_start(candidates)
        return self._measuring.metrics(state, focus.reader, delta, Direct(self.model), focus.nbytes)

    def accept(self, trial: Trial, k: int) -> None:
        """Make a trial's k-th circuit, as to its reader, the current one."""
        self._move(trial.reader, trial.candidates[k], trial.candidates)

    def cut(self, reader: int, writers: Sequence[int]) -> None:
        """Remove exactly these edges into a reader from the current circuit."""
        self._move(reader, writers, [writers])

    @in_session
    @torch.no_grad()
    def _move(self, reader: int, gone: Sequence[int], tried: Sequence[Sequence[int]]) -> None:
        self._kept[reader] = self.graph.all_edges[reader]
        self._kept[reader, list(gone)] = False
        if self._focus is None or self._focus.reader != reader:
            self._focus = None  # tests start from another circuit now
        else:
            self._focus.move(gone, tried)

    def finish(self) -> None:
        """Free what can be made again."""
        self._focus = self._state = None
        self._captured.forget()
        self.session.end()
        self._buffers.clear()
