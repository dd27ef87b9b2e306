"""The sparse engine: one edge test costs what the edge can change.

While reader r is tested everything upstream still has all its edges, so upstream activations are those
of the clean run, captured once. Downstream only nodes reached through kept edges can change. One test
is r's node, the live nodes above it, and the metric.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pahq_hf.capture import Activations, ablated, capture
from pahq_hf.config import Ablation, MetricName
from pahq_hf.engine.budget import MemoryBudget, out_of_memory
from pahq_hf.engine.heads import HeadMath
from pahq_hf.engine.held import HeldWeights
from pahq_hf.engine.hooks import head_outputs
from pahq_hf.engine.propagate import Propagation
from pahq_hf.engine.readout import Readout
from pahq_hf.engine.state import CircuitState
from pahq_hf.engine.streams import Streams
from pahq_hf.engine.timing import Phases
from pahq_hf.engine.tokens import TokenPlan
from pahq_hf.graph import BoolArray, Graph
from pahq_hf.metrics import Metric, checked
from pahq_hf.patch import PatchedModel
from pahq_hf.tasks.base import Task


class SparseEngine:
    """Computes only what an edge can change.

    Args:
        model: The patched model. Its precision at construction is the one of the captured runs.
        task: The prompts.
        metric: What to minimise.
        ablation: What stands in for removed edges.
        raise_active: Compute the node of the reader in focus in FP32 (the paper's rule).
        memory_budget: Bytes that a batch of candidates and decoded weights may take; a share of what
            is free by default.
        liveness: Compute nodes only at tokens that matter; False computes all tokens, for tests.
    """

    def __init__(
        self,
        model: PatchedModel,
        task: Task,
        metric: MetricName,
        *,
        ablation: Ablation = "corrupted",
        raise_active: bool = False,
        memory_budget: int | None = None,
        liveness: bool = True,
    ) -> None:
        self.model = model
        self.task = task
        self.graph: Graph = model.graph
        self.phases = Phases()
        self.evaluations = 0
        with self.phases("capture"), torch.no_grad():
            clean = capture(model, task, task.clean_ids)
            self._corrupted = capture(model, task, task.corrupted_ids)
            self._substitute = ablated(model, clean, self._corrupted, task, ablation)
            # Raising a component changes it at every token, also before the prompts differ.
            from_start = ablation != "corrupted" or raise_active
            plan = (
                TokenPlan.of(task, from_start=from_start, device=model.device)
                if liveness
                else TokenPlan.everywhere(task, model.device)
            )
            self.clean_logits = clean.logits
            self.metric = Metric(metric, task, clean.logits, model.device)
            for run in (clean, self._corrupted):
                self.metric(run.logits)  # NaN fails here, before anything is searched or written
            self._readout = Readout(self.metric, model.unembedding, clean.logits)
            self._streams = Streams(model, plan, clean, self._substitute)
        self._clean: Activations = clean
        self._raise_active = raise_active
        self._fixed = ablation != "corrupted"
        self._plan = plan
        self._memory = MemoryBudget(memory_budget, model)
        self._held = HeldWeights(self._memory.limit)
        self._kept = self.graph.all_edges.copy()
        self._reader: int | None = None
        self._gone: Tensor | None = None  # what lost edges of the reader in focus took away
        self._tried: tuple[list[int], Tensor] | None = None
        self._state = self._new_state()

    def _new_state(self) -> CircuitState:
        math = [
            HeadMath(layer, self._plan, self._clean, number, len(self.task))
            for number, layer in enumerate(self.model.layers)
        ]
        return CircuitState(self.model, self._streams, math, self._held)

    # -- any circuit ------------------------------------------------------------------------------

    @torch.no_grad()
    def metric_of(self, kept: BoolArray) -> float:
        """The minimised metric of a circuit, from the live nodes only."""
        state = self._new_state()
        state.update(kept, self._floor_of(kept))
        return self._read(state.inputs[self.graph.logits_reader][None])[0]

    def _floor_of(self, kept: BoolArray) -> int:
        """First node that a removed edge touches."""
        rows = np.flatnonzero((self.graph.all_edges & ~kept).any(axis=1))
        nodes = [node for row in rows for node in self.graph.readers[row].nodes]
        return min(nodes, default=len(self.graph.writers))

    # -- the protocol of acdc.Engine --------------------------------------------------------------

    @torch.no_grad()
    def begin(self, kept: BoolArray) -> float:
        """Start from an edge set; its metric."""
        self._kept = kept.copy()
        self._state = self._new_state()
        self._state.update(kept, self._floor_of(kept))
        return self._read(self._state.inputs[self.graph.logits_reader][None])[0]

    @torch.no_grad()
    def focus(self, reader: int) -> float | None:
        """Turn to a reader; the metric measured again when that changed a weight's precision."""
        self._commit()
        self._reader = reader
        nodes = self.graph.readers[reader].nodes
        changed = self._raise(reader) if self._raise_active else set()
        floor = nodes[0] if nodes else len(self.graph.writers)
        if nodes and self.graph.readers[reader].kind != "mlp":
            floor = self.graph.head_writer(self.graph.readers[reader].layer, 0)
        with self.phases("refresh"):
            self._state.update(self._kept, floor, changed)
        if not changed:
            return None
        return self._read(self._state.inputs[self.graph.logits_reader][None])[0]

    @torch.no_grad()
    def try_removals(self, reader: int, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Metric with each candidate's edges into `reader` removed besides those already gone.

        Candidates are computed side by side as far as memory allows; when it runs out, in halves.
        """
        if reader != self._reader:
            raise ValueError("focus on a reader before trying its edges")
        with self.phases("node"):
            delta = self._input_changes(reader, candidates)
        values: list[float] = []
        while len(values) < len(candidates):
            size = self._memory.batch(self._state, reader)
            try:
                values += self._try(reader, delta[len(values) : len(values) + size])
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error) or not self._memory.halve(size):
                    raise
        return values

    def _try(self, reader: int, delta: Tensor) -> list[float]:
        with self.phases("propagation"):
            final = Propagation(self._state, reader, delta).final()
        return self._read(final)

    @torch.no_grad()
    def remove(self, reader: int, writers: Sequence[int]) -> None:
        """Remove edges into a reader for good."""
        self._kept[reader, list(writers)] = False
        if reader != self._reader or not writers:
            return
        known, differences = self._tried or ([], torch.empty(0))
        if set(writers) <= set(known):
            taken = differences[[known.index(w) for w in writers]].sum(0)
        else:
            taken = self._streams.differences(list(writers), self._state.reader_liveness(reader)).sum(0)
        self._gone = taken if self._gone is None else self._gone + taken

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the model as it was."""
        self._commit()
        self._held.release()
        self.model.precision.deactivate()
        self._state.substitute_shifts.clear()

    def _commit(self) -> None:
        self._gone = self._tried = self._reader = None

    def _input_changes(self, reader: int, candidates: Sequence[Sequence[int]]) -> Tensor:
        """Change of the reader's input for every candidate. [K, tokens, d_model]"""
        writers = sorted({w for candidate in candidates for w in candidate})
        column = {writer: number for number, writer in enumerate(writers)}
        choose = torch.zeros(len(candidates), len(writers))
        for row, candidate in enumerate(candidates):
            choose[row, [column[w] for w in candidate]] = -1
        liveness = self._state.reader_liveness(reader)
        differences = self._streams.differences(writers, liveness)  # [writer, tokens, d_model]
        self._tried = (writers, differences)
        change = torch.tensordot(choose.to(differences), differences, dims=1)
        return change if self._gone is None else change.sub_(self._gone)

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
        if not self.model.precision.activate(*names):
            return set()
        self._state.substitute_shifts.clear()
        touched = self._touched(self.model.precision.active)
        if touched and not self._fixed:
            self._recompute_substitute(reader, touched)
        return before | touched

    def _touched(self, components: frozenset[str]) -> set[int]:
        """Nodes that compute with weights of some components: heads share their group's k and v."""
        graph = self.graph
        size = graph.spec.heads // graph.spec.kv_groups
        touched = set()
        for name in components:
            writer = graph.writers[graph.writer_index(name)]
            if writer.head is None:
                touched.add(graph.writer_index(name))
            else:
                first = writer.head // size * size
                touched |= {graph.head_writer(writer.layer, h) for h in range(first, first + size)}
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
        new = window.pick(head_outputs(layer, self._corrupted, number))[:, heads].transpose(0, 1)
        old = window.pick(self._substitute.z[number])[:, heads].transpose(0, 1)
        change = self._streams.change(number, heads, new, old)
        for head, value in zip(heads, change, strict=True):
            shifts[self.graph.head_writer(number, head)] = value
