"""Where the nodes and edges of a circuit go: plain positions, for any way of drawing them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pahq_hf.circuit.graph import BoolArray, Graph, ReaderKind, Writer, edge_list
from pahq_hf.circuit.scored_edges import ScoredEdges

NodeKind = Literal["input", "head", "mlp", "logits"]

DRAWN_EDGES = 4000  # of a still picture: more take long, and make one blot

_MLP_RISE = 0.5  # an MLP reads the heads of its layer: edges to it lead upwards too
_MLP_GAP = 1.5
_BEND_HALFWAY = 6.0
# Two heads may be linked by query, key and value at once.
_BEND_OF_KIND: dict[ReaderKind, float] = {"q": -0.12, "k": 0.0, "v": 0.12, "mlp": 0.0, "logits": 0.0}


@dataclass(frozen=True)
class LayoutNode:
    """A node and its position.

    Attributes:
        name: Name as in EAP-IG and MIB.
        kind: What it is.
        layer: Decoder layer; -1 for `input`, the number of layers for `logits`.
        x: One unit per head, 0 in the middle.
        y: One unit per layer, upwards; 0 for `input`.
    """

    name: str
    kind: NodeKind
    layer: int
    x: float
    y: float


@dataclass(frozen=True)
class LayoutEdge:
    """A line from a node to a node.

    Attributes:
        writer: Node it starts from.
        reader: Node it leads to; a shared key/value group has one line to each of its heads.
        reader_name: The reader's full name, such as `a1.kv0<k>`.
        kind: What is computed from it.
        score: The score of the edge.
        tested: Whether the edge was tested.
        bend: How far to the right the control point of a quadratic curve lies from the line's middle:
            lines that skip layers pass beside the nodes between.
        live: Whether the edge is on a path from `input` to `logits`.
    """

    writer: str
    reader: str
    reader_name: str
    kind: ReaderKind
    score: float
    tested: bool
    bend: float
    live: bool


@dataclass(frozen=True)
class Layout:
    """A circuit laid out: `input` at the bottom, a row per layer, `logits` at the top.

    Attributes:
        nodes: Nodes in model order.
        edges: Lines, those of one shared reader next to each other.
        rows: Height and name of every row, from the bottom.
    """

    nodes: tuple[LayoutNode, ...]
    edges: tuple[LayoutEdge, ...]
    rows: tuple[tuple[float, str], ...]


def layout(circuit: ScoredEdges, *, all_nodes: bool = False, most: int | None = None) -> Layout:
    """Place the nodes and edges of a circuit.

    A head has the same column in every layer, whoever else is in the circuit.

    Args:
        circuit: The circuit.
        all_nodes: Place the nodes outside the circuit, too.
        most: Place no more edges than this, those with the largest scores.

    Returns:
        The positions.
    """
    graph = circuit.graph
    places = {writer.name: _place(graph, writer) for writer in graph.writers}
    places["logits"] = LayoutNode("logits", "logits", graph.spec.layers, 0.0, float(graph.spec.layers + 1))
    edges: list[LayoutEdge] = []
    for r, w in edge_list(circuit.kept if most is None else _strongest(circuit, most)):
        reader, start = graph.readers[r], places[graph.writers[w].name]
        for target in circuit.targets(r):
            edges.append(
                LayoutEdge(
                    writer=start.name,
                    reader=target,
                    reader_name=reader.name,
                    kind=reader.kind,
                    score=float(circuit.scores[r, w]),
                    tested=bool(circuit.tested[r, w]),
                    bend=_bend(graph, start, places[target], reader.kind),
                    live=bool(circuit.live[r, w]),
                )
            )
    names = list(places) if all_nodes else circuit.nodes
    return Layout(tuple(places[name] for name in names), tuple(edges), tuple(_rows(graph)))


def _strongest(circuit: ScoredEdges, most: int) -> BoolArray:
    """The kept edges with the largest scores, those first in model order where scores are equal."""
    sizes = np.nan_to_num(np.abs(circuit.scores), nan=np.inf)[circuit.kept]
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[np.argsort(-sizes, kind="stable")[:most]] = True
    result = circuit.graph.no_edges()
    result[circuit.kept] = chosen
    return result


def _place(graph: Graph, writer: Writer) -> LayoutNode:
    half = (graph.spec.heads - 1) / 2
    if writer.is_input:
        return LayoutNode(writer.name, "input", writer.layer, 0.0, 0.0)
    row = float(writer.layer + 1)
    if writer.head is None:
        return LayoutNode(writer.name, "mlp", writer.layer, half + _MLP_GAP, row + _MLP_RISE)
    return LayoutNode(writer.name, "head", writer.layer, writer.head - half, row)


def _bend(graph: Graph, start: LayoutNode, end: LayoutNode, kind: ReaderKind) -> float:
    """Outwards, and the further the more rows are skipped, up to a third of the width."""
    skipped = max(0.0, end.y - start.y - 1)
    side = math.copysign(1.0, start.x + end.x)
    widest = max(1.0, graph.spec.heads / 3)
    return side * widest * skipped / (skipped + _BEND_HALFWAY) + _BEND_OF_KIND[kind]


def _rows(graph: Graph) -> list[tuple[float, str]]:
    layers = [(float(layer + 1), f"layer {layer}") for layer in range(graph.spec.layers)]
    return [(0.0, "input"), *layers, (float(graph.spec.layers + 1), "logits")]
