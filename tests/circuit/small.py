"""A small circuit of a model without weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import Graph, GraphSpec


def small(share: float = 0.5, **discovery: Any) -> Circuit:
    graph = Graph(GraphSpec(2, 4, 2))
    numbers = np.random.default_rng(3)
    kept = graph.all_edges & (numbers.random(graph.all_edges.shape) < share)
    scores = np.where(kept, numbers.random(kept.shape), 0.0)
    return Circuit(graph, kept, scores, kept.copy(), {"base_model": "me/model"}, discovery)
