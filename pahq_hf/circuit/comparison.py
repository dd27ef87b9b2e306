"""How alike two circuits are."""

from __future__ import annotations

from typing import Any

import numpy as np

from pahq_hf.circuit.graph import READER_KINDS, BoolArray
from pahq_hf.circuit.scored_edges import ScoredEdges
from pahq_hf.errors import CircuitError

_ENDS = {"input", "logits"}  # of every circuit


def compare_circuits(a: ScoredEdges, b: ScoredEdges) -> dict[str, Any]:
    """Overlap and correlation of two circuits of one graph.

    Args:
        a: The edges of one.
        b: The edges of the other.

    Returns:
        Edge counts, Jaccard indices of edges (also by kind of reader) and of heads and MLPs, and the Pearson
        and Spearman correlations of the scores of edges that both tested or estimated, or only ranked, by
        masks; None where nothing is to compare.

    Raises:
        CircuitError: If their graphs differ.
    """
    check_same_graph(a, b)
    rows = {kind: np.array([reader.kind == kind for reader in a.graph.readers]) for kind in READER_KINDS}
    nodes = set(a.nodes) - _ENDS, set(b.nodes) - _ENDS
    both, tested = a.ranked & b.ranked, a.tested & b.tested
    estimated = tested & (a.estimates | b.estimates)
    untested = int((both & ~tested).sum())
    return {
        "edges": {
            "first": a.edge_count,
            "second": b.edge_count,
            "both": int((a.kept & b.kept).sum()),
            "only first": int((a.kept & ~b.kept).sum()),
            "only second": int((b.kept & ~a.kept).sum()),
        },
        "jaccard": jaccard(a.kept, b.kept),
        "jaccard by kind": {kind: jaccard(a.kept[mask], b.kept[mask]) for kind, mask in rows.items()},
        "jaccard of nodes": len(nodes[0] & nodes[1]) / len(nodes[0] | nodes[1]) if any(nodes) else None,
        "scores": {
            "tested by both": int((tested & ~estimated).sum()),
            **({"not tested by both": untested} if untested else {}),
            **({"estimated by one": int(estimated.sum())} if estimated.any() else {}),
            "pearson": _correlation(a.scores[both], b.scores[both]),
            "spearman": _correlation(_ranks(a.scores[both]), _ranks(b.scores[both])),
        },
    }


def check_same_graph(a: ScoredEdges, b: ScoredEdges) -> None:
    """Check that two circuits can be compared.

    Raises:
        CircuitError: If their graphs differ.
    """
    if a.graph.spec != b.graph.spec:
        raise CircuitError(
            f"these circuits are of different graphs, {a.graph.spec} and {b.graph.spec}: nothing to compare"
        )


def jaccard(a: BoolArray, b: BoolArray) -> float | None:
    """Intersection over union; None for two empty sets."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else None


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks; ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]
