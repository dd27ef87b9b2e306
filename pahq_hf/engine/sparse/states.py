"""New states of circuits, and where in the model a circuit begins to differ from the clean run."""

from __future__ import annotations

import numpy as np

from pahq_hf.capture.activations import Activations
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.arithmetic import Anchored, Direct
from pahq_hf.engine.sparse.captured import Captured
from pahq_hf.engine.sparse.heads import HeadMath
from pahq_hf.engine.sparse.state import CircuitState
from pahq_hf.modeling.patched_model import PatchedModel


def new_state(
    model: PatchedModel, rule: RegimeRule, captured: Captured, clean: Activations, examples: int
) -> CircuitState:
    """The state of the full model, which holds nothing.

    Args:
        model: The patched model.
        rule: How low precision is used.
        captured: The captured constants.
        clean: The clean run.
        examples: Of the task.
    """
    math = [
        HeadMath(layer, captured.plan, clean, number, examples) for number, layer in enumerate(model.layers)
    ]
    arithmetic = Anchored(model) if rule.anchored else Direct(model)
    return CircuitState(model.graph, captured, math, model.precision.shared.cache, arithmetic)


def floor_of(graph: Graph, kept: BoolArray) -> int:
    """First node that a removed edge touches."""
    rows = np.flatnonzero((graph.all_edges & ~kept).any(axis=1))
    nodes = [node for row in rows for node in graph.readers[row].feeds]
    return min(nodes, default=len(graph.writers))
