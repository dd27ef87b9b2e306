"""Circuits that papers found by hand, as edge sets."""

from pahq_hf.ground_truth.circuits import (
    CANONICAL_CIRCUITS,
    GREATER_THAN_HEADS,
    GREATER_THAN_MLPS,
    IOI_HEADS,
    canonical_circuit,
    canonical_edges,
    canonical_graph,
)

__all__ = [
    "CANONICAL_CIRCUITS",
    "GREATER_THAN_HEADS",
    "GREATER_THAN_MLPS",
    "IOI_HEADS",
    "canonical_circuit",
    "canonical_edges",
    "canonical_graph",
]
