"""What each edge of a circuit is worth alone: m(C without the edge) - m(C)."""

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


def drop_each(
    state: CircuitState,
    kept: BoolArray,
    before: float,
    measuring: Measuring,
    memory: MemoryBudget,
    fitting: Fitting,
) -> NDArray[np.float64]:
    """What removing each edge of a circuit alone adds to the metric.

    Args:
        state: The circuit's state, all its live nodes held.
        kept: The circuit. [readers, writers]
        before: Its metric.
        measuring: Measures circuits near a state.
        memory: Bounds how many removals are computed at once.
        fitting: Goes on with less when memory runs out.

    Returns:
        Differences of the metric, 0 where there is no edge. [readers, writers]
    """
    effects = np.zeros(kept.shape)
    for reader in np.flatnonzero(kept.any(axis=1)).tolist():
        liveness = state.reader_liveness(reader)
        if liveness is Liveness.DEAD:
            continue  # nothing reads its node
        writers = np.flatnonzero(kept[reader]).tolist()
        few = min(WRITERS, memory.together(len(state.plan.at(liveness))))
        for start in range(0, len(writers), few):
            some = writers[start : start + few]
            values = fitting(partial(_without_each, state, reader, some, measuring))
            effects[reader, some] = np.array(values) - before
    return effects


def _without_each(
    state: CircuitState, reader: int, writers: Sequence[int], measuring: Measuring
) -> list[float]:
    """Metrics of a circuit without each of some edges."""
    delta = -state.carried(writers, state.reader_liveness(reader))
    return measuring.metrics(state, reader, delta, state.arithmetic)
