"""Whole nodes as the units of a circuit: heads and MLPs, each with all its edges out (docs/semantics.md).

A set of nodes is a set of edges: those between nodes that are in. `input` and `logits` always are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.gates import GATES, FoundBy
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.errors import CircuitError

Floats = NDArray[np.float64]
NODE_TENSORS = ("node_score", "node_in_graph", "node_tested", "node_found_by", "node_frequency")
_NEEDED = 3  # of these


@dataclass(frozen=True, eq=False)
class ScoredNodes:
    """Which nodes make a circuit, and their scores; `input` is in, untested, with score 0.

    Attributes:
        kept: Nodes of the circuit. [writers]
        scores: What removing a node, with all its edges out, did to the metric, or its attribution. [writers]
        tested: Nodes that have a score. [writers]
        found_by: Who found each node of a search in both directions (`gates.found_by`). [writers]
        frequencies: In which share of resamples the search kept each node. [writers]
    """

    kept: BoolArray
    scores: Floats
    tested: BoolArray
    found_by: FoundBy | None = None
    frequencies: Floats | None = None

    @property
    def count(self) -> int:
        """How many heads and MLPs are in."""
        return int(self.kept[1:].sum())

    def more_of(self, node: int) -> dict[str, str | float]:
        """What is known of a node beside whether it is in: its `score`, `gate`, `frequency`."""
        gate = None if self.found_by is None else GATES.get(int(self.found_by[node]))
        found: dict[str, str | float | None] = {
            "score": float(self.scores[node]),
            "gate": gate,
            "frequency": None if self.frequencies is None else float(self.frequencies[node]),
        }
        return (
            {name: value for name, value in found.items() if value is not None} if self.tested[node] else {}
        )


def edges_between(graph: Graph, nodes: BoolArray) -> BoolArray:
    """The edges between nodes that are in.

    A reader that several heads share is in where one of them is; where heads are coupled by a norm, as long
    as one head of the layer is: without what it reads that one would not write the same.

    Args:
        graph: The graph.
        nodes: Which nodes are in; `input` is in any case. [writers]

    Returns:
        [readers, writers]
    """
    inside = nodes.copy()
    inside[0] = True
    read = np.array([not reader.feeds or bool(inside[list(reader.feeds)].any()) for reader in graph.readers])
    edges: BoolArray = graph.all_edges & inside[None, :] & read[:, None]
    return edges


def tested_between(graph: Graph, tested: BoolArray) -> BoolArray:
    """The edges that tests of nodes decided: those whose ends, of those that can go, were all tested.

    `input` and `logits` cannot go, so that the edge between them was not tested either.

    Args:
        graph: The graph.
        tested: Which nodes were. [writers]

    Returns:
        [readers, writers]
    """
    ends = tested.copy()
    ends[0] = True
    read = np.array([bool(ends[list(reader.feeds)].all()) for reader in graph.readers])
    edges: BoolArray = graph.all_edges & ends[None, :] & read[:, None]
    edges[graph.logits_reader, 0] = False
    return edges


def scores_between(graph: Graph, scores: Floats, *, by_size: bool) -> Floats:
    """Scores of edges that choose, at any threshold, the edges between the nodes that reach it.

    An edge is worth what the lesser of its two ends is; a reader is worth what the best head that it feeds
    is, and `input` and `logits` what the best node is.

    Args:
        graph: The graph.
        scores: Of nodes; that of `input` counts for nothing. [writers]
        by_size: Whether a score is better the larger it is in size.

    Returns:
        [readers, writers]
    """
    worth = np.abs(scores) if by_size else scores
    best = 1 + int(np.argmax(worth[1:]))
    writers = np.arange(len(graph.writers))
    writers[0] = best
    readers = np.array([max(reader.feeds, key=lambda w: worth[w], default=best) for reader in graph.readers])
    lesser = np.where(worth[writers][None, :] <= worth[readers][:, None], writers[None, :], readers[:, None])
    found: Floats = np.where(graph.all_edges, scores[lesser], 0.0)
    return found


# -- in files -----------------------------------------------------------------------------------------


def node_tensors(nodes: ScoredNodes) -> dict[str, NDArray[Any]]:
    """What scores.safetensors has of nodes, by name. Each [writers]"""
    own = (nodes.scores, nodes.kept, nodes.tested, nodes.found_by, nodes.frequencies)
    found = {name: values for name, values in zip(NODE_TENSORS, own, strict=True) if values is not None}
    return {
        name: values if values.dtype == np.float64 else values.astype(np.uint8)
        for name, values in found.items()
    }


def read_nodes(
    tensors: Mapping[str, NDArray[Any]], told: object, graph: Graph, kept: BoolArray, folder: Path
) -> ScoredNodes | None:
    """Nodes and their scores, where a circuit is one of nodes; None where it is one of edges.

    Args:
        tensors: What scores.safetensors has, by name.
        told: What circuit.json says of nodes.
        graph: The graph.
        kept: The circuit's edges. [readers, writers]
        folder: Where it is.

    Raises:
        CircuitError: If the two say different things.
    """
    if not any(name in tensors for name in NODE_TENSORS):
        return None
    missing = next((name for name in NODE_TENSORS[:_NEEDED] if name not in tensors), None)
    if missing is not None:
        raise CircuitError(f"{folder}: its scores have no {missing!r}, as those of nodes do")
    score, inside, tested = (tensors[name] for name in NODE_TENSORS[:_NEEDED])
    by, frequencies = (tensors.get(name) for name in NODE_TENSORS[_NEEDED:])
    nodes = ScoredNodes(
        inside.astype(bool),
        score.astype(np.float64),
        tested.astype(bool),
        None if by is None else by.astype(np.uint8),
        None if frequencies is None else frequencies.astype(np.float64),
    )
    if not np.array_equal(edges_between(graph, nodes.kept), kept):
        raise CircuitError(f"{folder}: its kept edges are not those between its kept nodes")
    known = {writer.name: number for number, writer in enumerate(graph.writers)}
    for name, facts in told.items() if isinstance(told, dict) else ():
        found = facts.get("score") if isinstance(facts, dict) else None
        if name in known and found is not None and found != nodes.scores[known[name]]:
            raise CircuitError(f"{folder}: its files disagree on the score of {name}")
    return nodes
