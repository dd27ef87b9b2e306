"""The sparse engine: one edge test costs what the edge can change.

While reader r is tested everything upstream still has all its edges, so upstream activations are those
of the clean run, captured once. Downstream only nodes reached through kept edges can change. One test
is r's node, the live nodes above it, and the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import capture
from pahq_hf.capture.store import ActivationStore, MemoryStore
from pahq_hf.capture.substitutes import ablated, written_heads
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.config import Ablation, EngineName
from pahq_hf.engine.phases import Phases
from pahq_hf.engine.protocol import Trial
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.arithmetic import Anchored, Arithmetic, Direct
from pahq_hf.engine.sparse.budget import MemoryBudget
from pahq_hf.engine.sparse.buffers import Workspace
from pahq_hf.engine.sparse.captured import Streams
from pahq_hf.engine.sparse.heads import HeadMath
from pahq_hf.engine.sparse.positions import Liveness, TokenPlan
from pahq_hf.engine.sparse.propagation import Propagation
from pahq_hf.engine.sparse.readout import Readout
from pahq_hf.engine.sparse.state import CircuitState
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.device_memory import memory_for, out_of_memory, until_it_fits
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import Metric, checked

T = TypeVar("T")

_WRITERS = 64  # whose differences are computed at once


class SparseEngine:
    """Computes only what an edge can change.

    Args:
        model: The patched model. Its precision at construction is the one of the captured runs.
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
        self.evaluations = 0
        self._rule = rule = rule or RegimeRule()
        store = store or MemoryStore()
        self._memory = MemoryBudget(memory_budget, model)
        self._memory.bound(model.precision)
        what = f"what {len(task)} prompt pairs of {task.length} tokens write and read in the model"
        room = memory_for(what, model.device)
        with self.phases("capture"), torch.no_grad(), self._rule.exactly(self.model), room:
            clean = capture(model, task, task.clean_ids, store)
            self._corrupted = capture(model, task, task.corrupted_ids, store)
            self._substitute = ablated(model, clean, self._corrupted, task, ablation, store)
            # Without anchors raising a component changes it at every token, also before the prompts differ.
            from_start = ablation != "corrupted" or (rule.raise_active and not rule.anchored)
            plan = (
                TokenPlan.of(task, from_start=from_start, device=model.device)
                if liveness
                else TokenPlan.everywhere(task, model.device)
            )
            self.clean_logits = clean.logits
            self.metric = Metric(metric, task, clean.logits, model.device)
            for run in (clean, self._corrupted):
                self.metric(run.logits)  # NaN fails here, before anything is searched or written
            hold = self._memory.holds_vocabulary
            self._readout = Readout(self.metric, model, clean, hold=hold)
            self._streams = Streams(model, plan, clean, self._substitute, store)
        self._clean: Activations = clean
        self._fixed = ablation != "corrupted"
        self._plan = plan
        self._workspace = Workspace(clean.embedding)
        self._kept = self.graph.all_edges.copy()
        self._reader: int | None = None
        self._missing: list[int] = []  # its edges that were gone when it came into focus
        self._gone: Tensor | None = None  # what those that went since then took away. [tokens, d_model]
        self._tried: tuple[list[int], Tensor] | None = None  # what some of its edges carry, as last computed
        self._state = self._new_state()
        self._is_current = False  # whether the state is that of the current circuit

    def _new_state(self) -> CircuitState:
        math = [
            HeadMath(layer, self._plan, self._clean, number, len(self.task))
            for number, layer in enumerate(self.model.layers)
        ]
        cache = self.model.precision.shared.cache
        return CircuitState(self.graph, self._streams, math, cache, self._arithmetic())

    def _arithmetic(self) -> Arithmetic:
        return Anchored(self.model) if self._rule.anchored else Direct(self.model)

    # -- any circuit ------------------------------------------------------------------------------

    @torch.no_grad()
    def metric_of(self, kept: BoolArray) -> float:
        """The minimised metric of a circuit, from the live nodes only."""
        # Captured runs and the state are exact.
        return self._fitting(lambda: self._read_moved(self._new_state(), kept, self._floor_of(kept)))

    def _read_moved(self, state: CircuitState, kept: BoolArray, floor: int) -> float:
        """The metric of a circuit, which a state becomes (`CircuitState.update`)."""
        state.update(kept, floor)
        return self._read(state.inputs[self.graph.logits_reader][None])[0]

    def _floor_of(self, kept: BoolArray) -> int:
        """First node that a removed edge touches."""
        rows = np.flatnonzero((self.graph.all_edges & ~kept).any(axis=1))
        nodes = [node for row in rows for node in self.graph.readers[row].feeds]
        return min(nodes, default=len(self.graph.writers))

    @torch.no_grad()
    def drop_each(self, kept: BoolArray) -> NDArray[np.float64]:
        """What removing each edge of a circuit alone adds to the metric.

        The whole circuit is computed once; of each removal only what it changes.

        Args:
            kept: The circuit. [readers, writers]

        Returns:
            m(C without the edge) - m(C), 0 where there is no edge. [readers, writers]
        """
        state = self._new_state()
        # Of a finished circuit every node may differ from the clean run.
        before = self._fitting(lambda: self._read_moved(state, kept, 1))
        effects = np.zeros(kept.shape)
        for reader in np.flatnonzero(kept.any(axis=1)).tolist():
            if state.reader_liveness(reader) is Liveness.DEAD:
                continue  # nothing reads its node
            writers, few = np.flatnonzero(kept[reader]), min(_WRITERS, self._together(reader, state))
            for start in range(0, len(writers), few):
                some = writers[start : start + few].tolist()
                values = self._fitting(partial(self._without_each, state, reader, some))
                effects[reader, some] = np.array(values) - before
        return effects

    def _without_each(self, state: CircuitState, reader: int, writers: Sequence[int]) -> list[float]:
        """Metric of a circuit without each of some edges."""
        carried = self._carried(state, reader, writers)
        return self._read(self._propagate(reader, -carried, state.arithmetic, state))

    def _carried(self, state: CircuitState, reader: int, writers: Sequence[int]) -> Tensor:
        """`a_w - c_w` under a circuit, at a reader's tokens. [writer, tokens, d_model]"""
        liveness = state.reader_liveness(reader)
        carried = self._streams.differences(writers, liveness)
        for number, writer in enumerate(writers):
            shift = state.shifts.get(writer)
            if shift is not None:
                carried[number] += self._plan.narrow(shift, state.liveness[writer], liveness)
        return carried

    # -- the current circuit ------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, kept: BoolArray) -> float:
        """Make an edge set the current circuit; its metric."""
        self._kept = kept.copy()
        self._restart()
        return self._fitting(self._read_state)

    def _restart(self) -> None:
        """Compute the current circuit from the captured runs."""
        self._leave()
        self.model.precision.deactivate()
        self._memory.bound(self.model.precision)  # `finish` ended that
        self._state = self._new_state()
        self._fitting(lambda: self._state.update(self._kept, self._floor_of(self._kept)))
        self._is_current = True

    def _read_state(self) -> float:
        """The current circuit's metric, which is where tests start from."""
        return self._read(self._state.inputs[self.graph.logits_reader][None])[0]

    @torch.no_grad()
    def focus(self, reader: int) -> float | None:
        """Turn to a reader; the metric measured again when that changed what tests start from."""
        self._leave()
        if not self._is_current:
            self._restart()
        self._missing = self._gone_now(reader)
        nodes = self.graph.readers[reader].nodes
        changed = self._raise(reader) if self._rule.raise_active else set()
        floor = nodes[0] if nodes else len(self.graph.writers)
        if nodes and self.graph.readers[reader].kind != "mlp":
            floor = self.graph.head_writer(self.graph.readers[reader].layer, 0)
        with self.phases("refresh"):
            self._fitting(lambda: self._state.update(self._kept, floor, changed))
        self._reader = reader
        return self._fitting(self._read_state) if changed or self._rule.anchored else None

    def _gone_now(self, reader: int) -> list[int]:
        """Writers of a reader's removed edges, ascending."""
        return np.flatnonzero(self.graph.all_edges[reader] & ~self._kept[reader]).tolist()

    @torch.no_grad()
    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Metric with exactly each candidate's edges into `reader` gone.

        Candidates are computed side by side as far as memory allows; when it runs out, in halves.

        Raises:
            OutOfMemoryError: If one candidate does not fit either.
        """
        if reader != self._reader:
            self.focus(reader)
        values: list[float] = []
        while len(values) < len(candidates):
            values += self._fitting(partial(self._try_some, reader, candidates[len(values) :]))
        return Trial.of(reader, candidates, values)

    def _try_some(self, reader: int, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Metrics of the first candidates, as many as fit."""
        while True:
            some = candidates[: self._together(reader, self._state)]
            try:
                return self._try(reader, some)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error) or not self._memory.halve_together(len(some)):
                    raise
                self._tried = None
            self._workspace.clear()  # only here the failed attempt has let go of what it had made

    def _try(self, reader: int, candidates: Sequence[Sequence[int]]) -> list[float]:
        with self.phases("node"):
            delta = self._input_changes(reader, candidates)
        finals = self._propagate(reader, delta, self._state.arithmetic, self._state)
        return self._read(finals)

    def _together(self, reader: int, state: CircuitState) -> int:
        """Writers or candidates of a reader at once."""
        return self._memory.together(len(self._plan.at(state.reader_liveness(reader))))

    @torch.no_grad()
    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """The same in FP32.

        Weights along the affected path are read from the checkpoint.
        """
        if reader != self._reader:
            self.focus(reader)
        with self.phases("second look"), self.model.precision.full_precision():
            values = self._fitting(partial(self._look, reader, candidates))
        return Trial.of(reader, candidates, values)

    def _look(self, reader: int, candidates: Sequence[Sequence[int]]) -> list[float]:
        delta = self._changes_to(candidates, self._state.reader_liveness(reader))
        return self._read(self._propagate(reader, delta, Direct(self.model), self._state))

    def _fitting(self, work: Callable[[], T]) -> T:
        """What some work gives; when memory runs out, again with less kept for speed, at last with nothing.

        Raises:
            OutOfMemoryError: If it does not fit then either.
        """
        return until_it_fits(work, self._give_way, "the circuit under search", self.model.device)

    def _give_way(self) -> bool:
        self._tried = None
        self._workspace.clear()
        more = self._memory.give_way()
        self._streams.terms = self._memory.together(len(self._plan.window))
        self.model.precision.release()
        self._memory.bound(self.model.precision)
        return more

    def _propagate(self, reader: int, delta: Tensor, arithmetic: Arithmetic, state: CircuitState) -> Tensor:
        """Final streams. [K, tokens, d_model] -> [K, rows, d_model]"""
        finals: list[Tensor] = []
        done, held = 0, delta.nbytes + (0 if self._tried is None else self._tried[1].nbytes)
        while done < delta.shape[0]:
            size = self._memory.batch(state, reader, held)
            try:
                finals.append(self._final(reader, delta[done : done + size], arithmetic, state))
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error) or not self._memory.halve(size):
                    raise
            else:
                done += size
                continue
            self._workspace.clear()  # only here the failed batch has let go of what it had made
        return torch.cat(finals)

    def _final(self, reader: int, delta: Tensor, arithmetic: Arithmetic, state: CircuitState) -> Tensor:
        with self.phases("propagation"):
            return Propagation(state, reader, delta, arithmetic, self._workspace).final()

    @torch.no_grad()
    def accept(self, trial: Trial, k: int) -> None:
        """Make a trial's k-th circuit, as to its reader, the current one."""
        self._move(trial.reader, trial.candidates[k], trial.candidates)

    @torch.no_grad()
    def cut(self, reader: int, writers: Sequence[int]) -> None:
        """Remove exactly these edges into a reader from the current circuit."""
        self._move(reader, writers, [writers])

    def _move(self, reader: int, gone: Sequence[int], tried: Sequence[Sequence[int]]) -> None:
        """Make exactly these edges into a reader those that are gone.

        What they carried is taken from what the whole trial's edges carried: computed together, so that the
        outcome is the same bits whether that is still at hand or not.
        """
        before = set(self._gone_now(reader))
        stays = sorted(before.intersection(gone))
        new = [writer for writer in gone if writer not in before]
        self._kept[reader] = self.graph.all_edges[reader]
        self._kept[reader, list(gone)] = False
        if reader != self._reader:
            self._leave()  # tests start from another circuit now
            return
        if len(stays) < len(before):
            with self._writer_precision():
                liveness = self._state.reader_liveness(reader)
                self._gone = -self._fitting(lambda: self._changes_to([stays], liveness))[0]
        if new:
            all_tried = sorted({w for c in tried for w in c} - set(stays))
            taken = self._fitting(lambda: self._taken(reader, new, all_tried))
            self._gone = taken if self._gone is None else self._gone + taken

    def _taken(self, reader: int, writers: Sequence[int], tried: list[int]) -> Tensor:
        """What some of the tried writers' edges carry to the reader in focus. [tokens, d_model]"""
        liveness, few = self._state.reader_liveness(reader), self._together(reader, self._state)
        if len(tried) <= few:
            known = self._tried is not None and self._tried[0] == tried
            differences = self._tried[1] if known and self._tried else self._differences(tried, liveness)
            return differences[[tried.index(w) for w in writers]].sum(0)
        parts = [writers[start : start + few] for start in range(0, len(writers), few)]
        return reduce(torch.add, (self._differences(some, liveness).sum(0) for some in parts))

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the model as it was."""
        self._leave()
        self.model.precision.release()
        self._workspace.clear()
        self.model.precision.deactivate()
        self._state = self._new_state()
        self._is_current = False

    def _leave(self) -> None:
        self._gone = self._tried = self._reader = None

    def _input_changes(self, reader: int, candidates: Sequence[Sequence[int]]) -> Tensor:
        """Change of the reader's input for every candidate. [K, tokens, d_model]"""
        gone = set(self._gone_now(reader))
        new = [[w for w in c if w not in gone] for c in candidates]
        back = [sorted(gone.difference(c)) for c in candidates]
        writers = sorted({w for some in (*new, *back) for w in some})
        liveness, few = self._state.reader_liveness(reader), self._together(reader, self._state)
        shape = (len(candidates), len(self._plan.at(liveness)), self._streams.width)
        change = self._workspace.take("candidates", shape)
        flat = change.view(len(candidates), -1)
        self._tried = None
        for start in range(0, max(1, len(writers)), few):
            some = writers[start : start + few]
            differences = self._differences(some, liveness, reuse=True)
            choose = (_choice(new, some) - _choice(back, some)).to(differences).neg_()
            if start == 0:
                torch.mm(choose, differences.flatten(1), out=flat)
            else:
                flat.addmm_(choose, differences.flatten(1))
            if len(some) == len(writers):
                self._tried = (writers, differences)
        return change if self._gone is None else change.sub_(self._gone)

    def _changes_to(self, sets: Sequence[Sequence[int]], liveness: Liveness) -> Tensor:
        """What the reader's input changes by when exactly these edges are gone, in bounded memory.

        Args:
            sets: Writers of the edges that are gone.
            liveness: The reader's.

        Returns:
            [K, tokens, d_model]
        """
        before = self._missing
        writers = sorted({w for gone in sets for w in gone} | set(before))
        total = self._clean.embedding.new_zeros(len(sets), len(self._plan.at(liveness)), self._streams.width)
        few = min(_WRITERS, self._memory.together(len(self._plan.at(liveness))))
        for start in range(0, len(writers), few):
            some = writers[start : start + few]
            differences = self._streams.differences(some, liveness)
            choose = _choice([before], some) - _choice(sets, some)
            total += torch.tensordot(choose.to(differences), differences, dims=1)
        return total

    def _writer_precision(self) -> AbstractContextManager[None]:
        """The precision of what tested edges carry."""
        return self.model.precision.full_precision() if self._rule.full_writers else nullcontext()

    def _differences(self, writers: Sequence[int], liveness: Liveness, *, reuse: bool = False) -> Tensor:
        """`a_w - c_w` of tested edges; in memory that is valid until the next call if `reuse` says so.

        Returns:
            [writer, tokens, d_model]
        """
        out = None
        if reuse:
            shape = (len(writers), len(self._plan.at(liveness)), self._streams.width)
            out = self._workspace.take("differences", shape)
        with self._writer_precision():
            return self._streams.differences(writers, liveness, out)

    def _read(self, final: Tensor) -> list[float]:
        """Metrics of final streams. [K, rows, d_model] -> K values"""
        self.evaluations += final.shape[0]
        with self.phases("metric"):
            values = self._readout(self.model.final_norm(final)).tolist()
        return [checked(value, self.metric.name) for value in values]

    # -- the active component -----------------------------------------------------------------------

    def _raise(self, reader: int) -> set[int]:
        """Raise the node of a reader to FP32. Returns nodes whose output may differ now."""
        nodes = self.graph.readers[reader].nodes
        names = [self.graph.writers[node].name for node in nodes]
        before = self._touched(self.model.precision.active)
        moved = self._fitting(lambda: self.model.precision.activate(*names))
        if not moved or self._rule.anchored:
            return set()  # with anchors the state is FP32 whatever component is active
        self._state.substitute_shifts.clear()
        touched = self._touched(self.model.precision.active)
        if touched and not self._fixed:
            self._fitting(lambda: self._recompute_substitute(reader, touched))
        return before | touched

    def _touched(self, components: frozenset[str]) -> set[int]:
        """Nodes that compute with weights of some components: heads share k, v and maybe a norm."""
        graph = self.graph
        size = graph.spec.heads // graph.spec.kv_groups
        touched = set()
        for name in components:
            writer = graph.writers[graph.writer_index(name)]
            if writer.head is None:
                touched.add(graph.writer_index(name))
            else:
                first = writer.head // size * size
                together = range(graph.spec.heads) if graph.spec.coupled else range(first, first + size)
                touched |= {graph.head_writer(writer.layer, h) for h in together}
        return touched

    def _recompute_substitute(self, reader: int, nodes: set[int]) -> None:
        number = self.graph.readers[reader].layer
        layer, window = self.model.layers[number], self._plan.window
        shifts = self._state.substitute_shifts
        if self.graph.readers[reader].kind == "mlp":
            new = layer.mlp(layer.mlp_norm(window.pick(self._corrupted.mlp_in[number])))
            shifts[self.graph.mlp_writer(number)] = new - window.pick(self._substitute.mlp[number])
            return
        heads = sorted(self.graph.writers[node].head or 0 for node in nodes)
        new = window.pick(written_heads(layer, self._corrupted, number))[:, heads].transpose(0, 1)
        old = window.pick(self._substitute.z[number])[:, heads].transpose(0, 1)
        change = self._streams.change(number, heads, new, old)
        for head, value in zip(heads, change, strict=True):
            shifts[self.graph.head_writer(number, head)] = value


def _choice(candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Tensor:
    """Which writers each candidate names. [K, writers]"""
    column = {writer: number for number, writer in enumerate(writers)}
    choose = torch.zeros(len(candidates), len(writers))
    for row, candidate in enumerate(candidates):
        choose[row, [column[w] for w in candidate if w in column]] = 1
    return choose
