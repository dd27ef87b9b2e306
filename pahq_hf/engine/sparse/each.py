"""What each edge is worth alone: m(C without it) - m(C) of a circuit's own, m(C with it) - m(C) of others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.sparse.budget import Fitting, MemoryBudget
from pahq_hf.engine.sparse.focus import WRITERS
from pahq_hf.engine.sparse.measuring import Measuring
from pahq_hf.engine.sparse.positions import Liveness
from pahq_hf.engine.sparse.state import CircuitState


def change_each(
    state: CircuitState,
    edges: BoolArray,
    sign: float,
    before: float,
    measuring: Measuring,
    memory: MemoryBudget,
    fitting: Fitting,
) -> NDArray[np.float64]:
    """What removing or adding each of some edges alone adds to the metric.

    Args:
        state: The circuit's state, all its live nodes held, and what the edges carry.
        edges: The edges. [readers, writers]
        sign: -1 removes them, 1 adds them.
        before: The circuit's metric.
        measuring: Measures circuits near a state.
        memory: Bounds how many changes are computed at once.
        fitting: Goes on with less when memory runs out.

    Returns:
        Differences of the metric, 0 where there is no edge. [readers, writers]
    """
    effects = np.zeros(edges.shape)
    for reader in np.flatnonzero(edges.any(axis=1)).tolist():
        liveness = state.reader_liveness(reader)
        if liveness is Liveness.DEAD:
            continue  # nothing reads its node
        writers = np.flatnonzero(edges[reader]).tolist()
        few = min(WRITERS, memory.together(len(state.plan.at(liveness))))
        for start in range(0, len(writers), few):
            some = writers[start : start + few]
            values = fitting(partial(_changed_by_each, state, reader, some, sign, measuring))
            effects[reader, some] = np.array(values) - before
    return effects


def _changed_by_each(
    state: CircuitState, reader: int, writers: Sequence[int], sign: float, measuring: Measuring
) -> list[float]:
    """Metrics of a circuit without, or with, each of some edges."""
    delta = sign * state.carried(writers, state.reader_liveness(reader))
    return measuring.metrics(state, reader, delta, state.arithmetic)
