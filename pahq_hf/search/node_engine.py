"""An engine and gradients as a search over whole nodes sees them.

A node that goes moves everything above it, so a test measures a whole circuit (`Engine.metric_of`): live
nodes only in the sparse engine, and by FP32 in regime `pahq`, as finished circuits are measured. So no
component is active in a test, tests need no second look, and none is nearer to the truth than another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.circuit.graph import BoolArray
from pahq_hf.config import EngineName
from pahq_hf.engine.one_by_one import change_each
from pahq_hf.engine.phases import Phases
from pahq_hf.engine.protocol import CircuitRuns, Engine, Part, Slopes, Trial
from pahq_hf.search.node_graph import NodeGraph


class NodeEngine:
    """An engine whose circuits are sets of nodes.

    Args:
        engine: Computes metrics of circuits of edges.
        graph: The graph of nodes.
    """

    gains_by_batches = False  # every test is a circuit of its own

    def __init__(self, engine: Engine, graph: NodeGraph) -> None:
        self._engine = engine
        self.graph = graph
        self._kept: BoolArray = graph.all_edges.copy()

    @property
    def name(self) -> EngineName:
        """Which engine it is."""
        return self._engine.name

    @property
    def evaluations(self) -> int:
        """Metric values computed so far."""
        return self._engine.evaluations

    @property
    def phases(self) -> Phases:
        """Seconds by phase."""
        return self._engine.phases

    @property
    def clean_logits(self) -> Tensor:
        """The full model's logits at the answer positions. [rows, vocab]"""
        return self._engine.clean_logits

    def begin(self, kept: BoolArray) -> float:
        """Make a set of nodes the current circuit; its metric."""
        self._kept = kept.copy()
        return self.metric_of(kept)

    def focus(self, reader: int) -> float | None:
        """Nothing changes what tests start from."""
        return None

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Metric with exactly each candidate's nodes of a block gone."""
        values = [self.metric_of(self._without(reader, gone)) for gone in candidates]
        return Trial.of(reader, candidates, values)

    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """The same: tests are as exact as they can be."""
        return self.try_(reader, candidates)

    def accept(self, trial: Trial, k: int) -> None:
        """Make a trial's k-th circuit, as to its block, the current one."""
        self.cut(trial.reader, trial.candidates[k])

    def cut(self, reader: int, writers: Sequence[int]) -> None:
        """Remove exactly these nodes of a block from the current circuit."""
        self._kept = self._without(reader, writers)

    def _without(self, block: int, gone: Sequence[int]) -> BoolArray:
        kept = self._kept.copy()
        kept[block] = self.graph.all_edges[block]
        kept[block, list(gone)] = False
        return kept

    def metric_of(self, kept: BoolArray) -> float:
        """The metric of any set of nodes."""
        return self._engine.metric_of(self._edges(kept))

    def empty_metric(self) -> float:
        """The metric of the model's graph without edges."""
        return self._engine.metric_of(self.graph.whole.no_edges())

    def drop_each(self, kept: BoolArray, edges: BoolArray | None = None) -> NDArray[np.float64]:
        """What removing each node of a circuit alone adds to its metric. [blocks, writers]"""
        return change_each(self.metric_of, kept, kept if edges is None else edges)

    def add_each(self, kept: BoolArray, absent: BoolArray) -> NDArray[np.float64]:
        """What adding each of some nodes alone to a circuit adds to its metric. [blocks, writers]"""
        return change_each(self.metric_of, kept, absent)

    def slopes(self, reader: int, candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Slopes:
        """How the metric moves, to first order, as nodes of a block go: the sum over all that they feed."""
        values: list[float] = []
        effects = np.zeros((len(candidates), len(writers)))
        sizes = np.zeros(len(writers))
        for number, gone in enumerate(candidates):
            edges = self._edges(self._without(reader, gone))
            values.append(self._engine.begin(edges))
            for place in self._live_readers(edges):
                seen = [k for k, writer in enumerate(writers) if writer < self.graph.whole.prefix[place]]
                if not seen:
                    continue
                removed = [w for w in self.graph.whole.in_edges(place) if not edges[place, w]]
                found = self._engine.slopes(place, [removed], [writers[k] for k in seen])
                effects[number, seen] += found.effects[0]
                sizes[seen] = np.maximum(sizes[seen], found.sizes)
        return Slopes(Trial.of(reader, candidates, values), tuple(writers), effects, sizes)

    def _live_readers(self, edges: BoolArray) -> Iterator[int]:
        """Readers whose node somebody reads."""
        whole = self.graph.whole
        yield from (r for r in range(len(whole.readers)) if whole.has_out_edge(edges, r))

    def _edges(self, kept: BoolArray) -> BoolArray:
        """The edges out of nodes that are kept. [readers, writers]"""
        return self.graph.opened(kept.astype(np.float64)) > 0

    def finish(self) -> None:
        """Free what can be made again."""
        self._engine.finish()


class NodeRuns:
    """Runs of a task in which every node has a share of what it writes.

    Args:
        runs: Runs in which every edge has one.
        graph: The graph of nodes.
    """

    def __init__(self, runs: CircuitRuns, graph: NodeGraph) -> None:
        self._runs = runs
        self.graph = graph

    @property
    def nbytes(self) -> int:
        """What the runs take in memory."""
        return self._runs.nbytes

    def circuit_parts(self, most: int | None = None) -> Iterator[Part]:
        """The task in runs of as many examples as memory allows, at most so many."""
        return self._runs.circuit_parts(most)

    def at_circuit(self, part: Part, shares: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """A part's metric where each node has a share, and what removing each would add to it.

        Args:
            part: The part.
            shares: 1 where a node is kept, 0 where it is gone. [blocks, writers]

        Returns:
            The part's share of the metric, and of what removing each node adds to it if all is linear.
            [blocks, writers]
        """
        value, effects = self._runs.at_circuit(part, self.graph.opened(shares))
        return value, self.graph.spread(effects.sum(axis=0))
