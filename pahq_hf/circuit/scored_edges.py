"""`ScoredEdges`: a graph's edges, which of them make a circuit, and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.gates import GATES, FoundBy
from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.circuit.nodes import ScoredNodes


def ranked(tested: BoolArray) -> BoolArray:
    """Where scores say something: where they were tested; everywhere if nowhere, as of masks.

    Args:
        tested: [readers, writers]

    Returns:
        [readers, writers]
    """
    return tested if tested.any() else np.ones_like(tested)


@dataclass(frozen=True, eq=False)
class ScoredEdges:
    """The edges of a circuit: all that is needed to draw, compare or export it.

    Attributes:
        graph: The model's whole graph.
        kept: Edges of the circuit. [readers, writers]
        scores: The score of every edge, 0 where there is none. [readers, writers]
        tested: Edges whose score was measured, or estimated. [readers, writers]
        estimated: Edges among them whose score is an estimate; None where the search takes none.
            [readers, writers]
        found_by: Who found each edge of a search in both directions; None of any other (`gates.found_by`).
            [readers, writers]
        frequencies: In which share of resamples of the prompts the search kept each edge; None of one without
            a bootstrap. [readers, writers]
        scored_nodes: Where whole nodes were kept or removed, which; an edge's score is that of the lesser of
            its ends then. None where edges were.
    """

    graph: Graph
    kept: BoolArray
    scores: NDArray[np.float64]
    tested: BoolArray
    estimated: BoolArray | None = None
    found_by: FoundBy | None = None
    frequencies: NDArray[np.float64] | None = None
    scored_nodes: ScoredNodes | None = None

    @property
    def edge_count(self) -> int:
        """Number of kept edges."""
        return int(self.kept.sum())

    @property
    def estimates(self) -> BoolArray:
        """Edges whose score is an estimate. [readers, writers]"""
        return np.zeros_like(self.tested) if self.estimated is None else self.estimated

    @property
    def ranked(self) -> BoolArray:
        """Edges whose scores compare: those that were tested; all of a search that tests none.

        [readers, writers]
        """
        return ranked(self.tested) & self.graph.all_edges

    def is_estimate(self, reader: int, writer: int) -> bool:
        """Whether an edge's score is an estimate."""
        return self.estimated is not None and bool(self.estimated[reader, writer])

    def gate(self, reader: int, writer: int) -> str | None:
        """What an edge is by who found it: `AND`, `OR` or `ADDER`; None where that is not known."""
        return None if self.found_by is None else GATES.get(int(self.found_by[reader, writer]))

    def frequency(self, reader: int, writer: int) -> float | None:
        """In which share of the resamples an edge was kept; None without a bootstrap."""
        return None if self.frequencies is None else float(self.frequencies[reader, writer])

    def more_of(self, reader: int, writer: int) -> dict[str, str | float]:
        """What some searches know of an edge beside its score: its `gate`, its `frequency`."""
        found = {"gate": self.gate(reader, writer), "frequency": self.frequency(reader, writer)}
        return {name: value for name, value in found.items() if value is not None}

    def more_of_node(self, name: str) -> dict[str, str | float]:
        """What is known of a node, where nodes have a score: that, its `gate`, its `frequency`."""
        if self.scored_nodes is None or name == "logits":
            return {}
        return self.scored_nodes.more_of(self.graph.writer_index(name))

    @property
    def gates(self) -> dict[str, str]:
        """The same by the names of the edges that have one, in model order."""
        pairs = [] if self.found_by is None else edge_list(self.kept & (self.found_by > 0))
        return {self.graph.edge_name(r, w): str(self.gate(r, w)) for r, w in pairs}

    @cached_property
    def live(self) -> BoolArray:
        """Kept edges on some path from `input` to `logits`. [readers, writers]"""
        return self.graph.live_edges(self.kept)

    @property
    def edges(self) -> list[tuple[str, float]]:
        """Kept edges by name with their scores, in model order."""
        return [(self.graph.edge_name(r, w), float(self.scores[r, w])) for r, w in edge_list(self.kept)]

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that a kept edge touches, in model order, `logits` last."""
        touched: BoolArray = np.any(self.kept, axis=0)
        for r in np.flatnonzero(self.kept.any(axis=1)):
            touched[self._led_to(int(r))] = True
        names = [writer.name for writer, inside in zip(self.graph.writers, touched, strict=True) if inside]
        return [*names, "logits"] if self.kept[self.graph.logits_reader].any() else names

    def _led_to(self, reader: int) -> list[int]:
        """Writers whose node an edge into a reader leads to; of nodes that are units those that are in."""
        nodes, units = self.graph.readers[reader].nodes, self.scored_nodes
        return [node for node in nodes if units is None or units.kept[node]]

    def targets(self, reader: int) -> list[str]:
        """Names of the nodes that an edge into a reader leads to: several where heads share it.

        Of whole nodes it is those that are in the circuit.
        """
        if not self.graph.readers[reader].nodes:
            return ["logits"]
        return [self.graph.writers[node].name for node in self._led_to(reader)]

    def to_networkx(self) -> nx.MultiDiGraph:
        """The kept edges as a directed multigraph of nodes.

        An edge carries `score`, `reader` (its full name), `kind` (q, k, v, mlp, logits) and, of a search in
        both directions, `gate`, with a bootstrap `frequency`. A shared key/value group becomes one edge to
        each of its heads. Where whole nodes were kept or removed, a node carries its `score`.

        Returns:
            The graph.
        """
        result = nx.MultiDiGraph()
        for name in self.nodes:
            result.add_node(name, **self.more_of_node(name))
        for r, w in edge_list(self.kept):
            reader = self.graph.readers[r]
            for target in self.targets(r):
                result.add_edge(
                    self.graph.writers[w].name,
                    target,
                    score=float(self.scores[r, w]),
                    reader=reader.name,
                    kind=reader.kind,
                    **self.more_of(r, w),
                )
        return result
