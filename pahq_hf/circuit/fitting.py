"""Circuits in graphs that divide keys and values otherwise: by groups that heads share, or head by head.

Other tools know heads only, and neither how many share a key/value group nor whether a norm couples them.
What their files leave open, a model decides.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import BoolArray, Graph, GraphSpec
from pahq_hf.errors import CircuitError


def is_of_heads(circuit: Circuit) -> bool:
    """Whether a circuit has a key and a value for each head because its file knew no others."""
    spec = circuit.graph.spec
    plain = spec.kv_groups == spec.heads and not spec.split_kv_groups and not spec.coupled
    return plain and circuit.identity.model_type is None


def fits(circuit: Circuit, spec: GraphSpec) -> bool:
    """Whether a circuit's graph differs from one of a shape in nothing but the division of keys and values.

    Args:
        circuit: The circuit.
        spec: The shape.
    """
    own = circuit.graph.spec
    if own.heads != spec.heads:
        return False
    if is_of_heads(circuit):  # the rest is what its file did not say
        own = replace(own, kv_groups=spec.kv_groups, coupled=spec.coupled)
    return replace(own, split_kv_groups=spec.split_kv_groups) == spec


def fitted(circuit: Circuit, spec: GraphSpec) -> Circuit:
    """A circuit in a model's graph, where the two differ in nothing but the division of keys and values.

    Args:
        circuit: The circuit.
        spec: The shape of the model's graph.

    Returns:
        The circuit in that graph; the same one where it is in it, or where the model is another.

    Raises:
        CircuitError: If it keeps an edge of some heads of a group that share keys or values in that graph.
    """
    if circuit.graph.spec == spec or not fits(circuit, spec):
        return circuit
    graph = Graph(spec)
    uneven = _uneven(circuit, graph)
    if uneven.any():
        r, w = np.argwhere(uneven)[0]
        name = graph.edge_name(int(r), int(w))
        raise CircuitError(
            f"this circuit keeps {int(uneven.sum()):,} edges, such as {name}, of some heads of a key/value "
            "group only: open the model with --split-kv-groups (split_kv_groups=True), or import the circuit "
            "with --model, which folds it"
        )
    return regrouped(circuit, graph)


def regrouped(circuit: Circuit, graph: Graph) -> Circuit:
    """A circuit in a graph of the same heads.

    An edge into keys or values that several heads share is kept where one of these heads keeps it. Its score
    is theirs where they agree, else the sum: to first order, what removing it from all of them does.

    Args:
        circuit: The circuit.
        graph: A graph with as many layers and heads.

    Returns:
        The circuit in that graph.
    """
    rows = _rows(circuit.graph, graph)

    def any_of(values: BoolArray) -> BoolArray:
        return np.array([values[row].any(axis=0) for row in rows])

    def score_of(row: list[int]) -> NDArray[np.float64]:
        own = circuit.scores[row]
        total: NDArray[np.float64] = np.where((own == own[0]).all(axis=0), own[0], own.sum(axis=0))
        return total

    found_by, frequencies = circuit.found_by, circuit.frequencies
    return replace(
        circuit,
        graph=graph,
        kept=any_of(circuit.kept),
        scores=np.array([score_of(row) for row in rows]),
        tested=any_of(circuit.tested),
        estimated=None if circuit.estimated is None else any_of(circuit.estimated),
        found_by=None
        if found_by is None
        else np.array([np.bitwise_or.reduce(found_by[row], axis=0) for row in rows]),
        frequencies=None if frequencies is None else np.array([frequencies[row].max(axis=0) for row in rows]),
    )


def uneven_edges(circuit: Circuit, graph: Graph) -> int:
    """How many edges of a graph of groups a circuit keeps for some heads of the group, and not for all."""
    return int(_uneven(circuit, graph).sum())


def in_one_graph(a: Circuit, b: Circuit) -> tuple[Circuit, Circuit]:
    """Two circuits in one graph, where theirs differ in nothing but the division of keys and values.

    That is the graph of groups, if no head is told from the others of its group, else that of heads.

    Args:
        a: One.
        b: The other.

    Returns:
        Both; as they are where their graphs differ in more.
    """
    known = [circuit.graph.spec for circuit in (a, b) if not is_of_heads(circuit)]
    if a.graph.spec == b.graph.spec or not known:
        return a, b
    candidates = sorted(known, key=lambda spec: spec.kv_readers)
    for spec in (*candidates, replace(known[0], split_kv_groups=True)):
        try:
            return fitted(a, spec), fitted(b, spec)
        except CircuitError:  # heads are told apart: the next has one reader each
            continue
    return a, b


def _rows(old: Graph, new: Graph) -> list[list[int]]:
    """For each reader of one graph, the readers of another that are about the same heads."""
    found = []
    for reader in new.readers:
        places = old.layer_readers(reader.layer, reader.kind)
        if reader.kind in ("k", "v"):
            shares = {old.kv_of_head(head) for head in new.heads_of_kv(reader.index)}
            found.append([places[share] for share in sorted(shares)])
        else:
            found.append([places[reader.index]])
    return found


def _uneven(circuit: Circuit, graph: Graph) -> BoolArray:
    """Edges of a graph that some readers in their place keep, and not all. [readers, writers]"""
    rows = _rows(circuit.graph, graph)
    return np.array([circuit.kept[row].any(axis=0) & ~circuit.kept[row].all(axis=0) for row in rows])
