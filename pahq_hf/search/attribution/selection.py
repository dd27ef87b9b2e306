"""Which edges the scores choose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.errors import ConfigError


def top_edges(graph: Graph, scores: NDArray[np.float64], count: int, *, absolute: bool) -> BoolArray:
    """The edges with the highest scores; of equal ones those that come first in the model.

    Args:
        graph: The graph.
        scores: [readers, writers]
        count: How many.
        absolute: Compare magnitudes.

    Returns:
        [readers, writers]

    Raises:
        ConfigError: If the graph has fewer edges.
    """
    if count > graph.edge_count:
        raise ConfigError(f"this model has {graph.edge_count:,} edges; cannot keep {count:,} of them")
    readers, writers = np.nonzero(graph.all_edges)
    values = scores[readers, writers]
    best = np.argsort(-(np.abs(values) if absolute else values), kind="stable")[:count]
    kept = graph.no_edges()
    kept[readers[best], writers[best]] = True
    return kept


def edges_from(graph: Graph, scores: NDArray[np.float64], threshold: float, *, absolute: bool) -> BoolArray:
    """The edges whose score reaches a threshold, as an edge that ACDC tests stays when it does.

    Args:
        graph: The graph.
        scores: [readers, writers]
        threshold: The least score.
        absolute: Compare magnitudes.

    Returns:
        [readers, writers]
    """
    reached: BoolArray = graph.all_edges & ((np.abs(scores) if absolute else scores) >= threshold)
    return reached
