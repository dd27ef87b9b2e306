"""What a search keeps or removes: single edges, or whole nodes (docs/searches.md).

This is the only place where the two differ. A search sees a graph, an engine and gradients; where nodes are
the units it is shown others, in which every head and MLP is one edge, and what it finds is turned back into
edges of the model's graph. No search asks which of the two it works with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.gates import found_by
from pahq_hf.circuit.graph import Graph
from pahq_hf.circuit.nodes import ScoredNodes, edges_between, scores_between, tested_between
from pahq_hf.engine.protocol import CircuitRuns, Engine
from pahq_hf.search.kind import Found
from pahq_hf.search.node_engine import NodeEngine, NodeRuns
from pahq_hf.search.node_graph import NodeGraph

Scores = NDArray[np.float64]


class Units(Protocol):
    """What is kept or removed as one."""

    @property
    def word(self) -> str:
        """What one is called."""

    @property
    def spare(self) -> int:
        """How many more than are asked for a search begins with at least, where it tests which may go."""

    @property
    def few(self) -> int:
        """Of how many at most such a search begins with all, and needs not learn which."""

    @property
    def graph(self) -> Graph:
        """The graph as a search sees it: what it calls edges are the units."""

    def engine(self, engine: Engine) -> Engine:
        """An engine as a search sees it."""

    def empty_metric(self, engine: Engine) -> float:
        """The metric of the circuit without edges, which faithfulness counts from; by what `engine` gave."""

    def smallest_metric(self, engine: Engine) -> float | None:
        """The metric of a circuit without units, where that has edges; by what `engine` gave."""

    def circuit_runs(self, runs: CircuitRuns) -> CircuitRuns:
        """Runs whose gradients can be taken at circuits, as a search sees them."""

    def scores(self, edges: Scores, *, adds_up: bool) -> Scores:
        """Scores of units, of those of edges by attribution. [readers, writers], each of its graph.

        Args:
            edges: Of edges.
            adds_up: Whether those of a node's edges out add up to its own.
        """

    def circuit(self, found: Found) -> Found:
        """What a search found, as edges of the model's graph."""

    def found(self, circuit: Circuit) -> Found:
        """A circuit as the search that found it would return it."""


@dataclass(frozen=True)
class Edges:
    """Single edges: a search sees everything as it is.

    Attributes:
        graph: The model's graph.
    """

    graph: Graph
    word = "edge"
    spare = 100
    few = 1000

    def engine(self, engine: Engine) -> Engine:
        """The engine itself."""
        return engine

    def empty_metric(self, engine: Engine) -> float:
        """The metric of no edges."""
        return engine.metric_of(self.graph.no_edges())

    def smallest_metric(self, engine: Engine) -> None:
        """None: a circuit without units has no edges."""

    def circuit_runs(self, runs: CircuitRuns) -> CircuitRuns:
        """The runs themselves."""
        return runs

    def scores(self, edges: Scores, *, adds_up: bool) -> Scores:
        """The scores themselves."""
        return edges

    def circuit(self, found: Found) -> Found:
        """What was found, as it is."""
        return found

    def found(self, circuit: Circuit) -> Found:
        """The circuit's edges."""
        return Found(circuit.kept, circuit.scores, circuit.tested, estimated=circuit.estimated)


@dataclass(frozen=True)
class Nodes:
    """Whole nodes: a head or MLP goes with all its edges out, and what reads for it alone goes with it.

    Attributes:
        whole: The model's graph.
        by_size: Whether scores count by their size.
    """

    whole: Graph
    by_size: bool = False
    word = "node"
    spare = 10
    few = 0  # each test of a node runs the whole circuit

    @cached_property
    def graph(self) -> NodeGraph:
        """A graph of a block for every layer's heads and every MLP."""
        return NodeGraph(self.whole)

    def engine(self, engine: Engine) -> Engine:
        """An engine that removes nodes."""
        return NodeEngine(engine, self.graph)

    def empty_metric(self, engine: Engine) -> float:
        """The metric of no edges."""
        return cast(NodeEngine, engine).empty_metric()

    def smallest_metric(self, engine: Engine) -> float:
        """The metric of no nodes: the edge from `input` to `logits` stays."""
        return engine.metric_of(self.graph.no_edges())

    def circuit_runs(self, runs: CircuitRuns) -> CircuitRuns:
        """Runs in which every node has a share."""
        return NodeRuns(runs, self.graph)

    def scores(self, edges: Scores, *, adds_up: bool) -> Scores:
        """The sum over a node's edges out, `(c_w - a_w) · ∂L/∂a_w`; or of its edge into `logits`.

        Returns:
            [blocks, writers]
        """
        return self.graph.spread(edges.sum(axis=0) if adds_up else edges[self.whole.logits_reader])

    def circuit(self, found: Found) -> Found:
        """The edges between the nodes that were found."""
        of = self.graph.gathered
        kept, scores, tested = of(found.kept).astype(bool), of(found.scores), of(found.tested).astype(bool)
        kept[0] = True
        by = None if found.found_by is None else of(found.found_by).astype(np.uint8)
        ways = [] if by is None else [edges_between(self.whole, (by & bit) > 0) for bit in (1, 2)]
        return replace(
            found,
            kept=edges_between(self.whole, kept),
            scores=scores_between(self.whole, scores, by_size=self.by_size),
            tested=tested_between(self.whole, tested),
            searched=None,
            found_by=found_by(*ways) if ways else None,
            nodes=ScoredNodes(kept, scores, tested, by),
        )

    def found(self, circuit: Circuit) -> Found:
        """The circuit's nodes. What is no circuit of nodes has those that it touches."""
        nodes = circuit.scored_nodes
        spread = self.graph.spread
        if nodes is None:
            written = spread(circuit.kept.any(axis=0).astype(float)).astype(bool)
            return Found(written, np.zeros(written.shape), np.zeros_like(written))
        kept, tested = (spread(each.astype(float)).astype(bool) for each in (nodes.kept, nodes.tested))
        return Found(kept, spread(nodes.scores), tested)


def units_of(options: Any, graph: Graph) -> Units:
    """The units of a search.

    Args:
        options: Its options; those of searches that know none are edges.
        graph: The model's graph.
    """
    if getattr(options, "level", "edge") != "node":
        return Edges(graph)
    return Nodes(graph, by_size=getattr(options, "criterion", None) == "absolute" or _by_size(options))


def _by_size(options: Any) -> bool:
    return bool(getattr(options, "by_size", getattr(options, "absolute", False)))
