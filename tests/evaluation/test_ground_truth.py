"""Published circuits hold the nodes their papers list, and edges that exist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.errors import CircuitError, ConfigError
from pahq_hf.evaluation.ground_truth.published import (
    CANONICAL_CIRCUITS,
    canonical_circuit,
    canonical_edges,
    canonical_graph,
)

# The lists of docs/semantics.md, section 8, typed again.
IOI = (
    "9.9 10.0 9.6 10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9 10.7 11.10 7.3 7.9 8.6 8.10 5.5 5.8 5.9 6.9 "
    "0.1 0.10 3.0 2.2 4.11"
)
GREATER_THAN = "0.1 0.3 0.5 5.5 6.1 6.9 7.10 8.11 9.1"
DOCSTRING = "0.5 1.2 1.4 2.0 3.0 3.6"


def heads(text: str) -> set[str]:
    return {"a{}.h{}".format(*head.split(".")) for head in text.split()}


@pytest.mark.parametrize(
    ("name", "listed", "mlps"),
    [("ioi", IOI, range(12)), ("greater_than", GREATER_THAN, range(12)), ("docstring", DOCSTRING, ())],
)
def test_nodes_are_the_papers(name: str, listed: str, mlps: range) -> None:
    nodes = {"input", "logits", *heads(listed), *(f"m{layer}" for layer in mlps)}
    assert set(canonical_circuit(name).nodes) == nodes


@pytest.mark.parametrize(("name", "count"), [("ioi", 963), ("greater_than", 235), ("docstring", 24)])
def test_edges_exist_and_are_live(name: str, count: int) -> None:
    graph = canonical_graph(name)
    kept = canonical_edges(name, graph)
    assert kept.sum() == count
    assert not (kept & ~graph.all_edges).any()
    assert np.array_equal(graph.live_edges(kept), kept)


def has(circuit: Circuit, edge: str) -> bool:
    return bool(circuit.kept[circuit.graph.parse_edge(edge)])


def test_composition_of_ioi() -> None:
    ioi = canonical_circuit("ioi")
    for edge in ("a9.h9->logits", "a8.h6->a9.h9<q>", "a5.h5->a7.h3<v>", "a2.h2->a5.h5<k>", "input->a0.h1<q>"):
        assert has(ioi, edge)
    for edge in (
        "a8.h6->a9.h9<k>",
        "a5.h5->logits",
        "a2.h2->a5.h5<q>",
        "a9.h9->a10.h0<q>",
        "input->a5.h5<k>",
    ):
        assert not has(ioi, edge)


def test_mlps_of_greater_than() -> None:
    circuit = canonical_circuit("greater_than")
    for edge in ("a9.h1->m9", "m11->logits", "a0.h1->m0", "m4->a9.h1<q>", "m4->m5"):
        assert has(circuit, edge)
    for edge in ("a0.h3->m0", "m4->a9.h1<k>", "m9->m10"):
        assert has(circuit, edge) == (edge == "m9->m10")


def test_can_be_saved(tmp_path: Path) -> None:
    circuit = canonical_circuit("docstring")
    circuit.save_pretrained(tmp_path)
    again = Circuit.from_pretrained(tmp_path)
    assert np.array_equal(again.kept, circuit.kept)
    assert "Heimersheim" in again.discovery["source"]


@pytest.mark.parametrize("name", CANONICAL_CIRCUITS)
def test_other_shapes_are_refused(name: str) -> None:
    with pytest.raises(CircuitError, match="another shape"):
        canonical_edges(name, Graph(GraphSpec(layers=2, heads=2, kv_groups=2)))
    if name != "docstring":
        parallel = Graph(GraphSpec(layers=12, heads=12, kv_groups=12, parallel=True))
        with pytest.raises(CircuitError, match="another shape"):
            canonical_edges(name, parallel)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="known: ioi"):
        canonical_graph("sonnet")
