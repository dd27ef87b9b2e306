"""What changing each edge of a circuit alone does, by whole circuits measured one after the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, edge_list


def change_each(
    metric_of: Callable[[BoolArray], float], kept: BoolArray, changed: BoolArray
) -> NDArray[np.float64]:
    """Take each of some edges out of a circuit, or add it where it is not in, alone.

    Args:
        metric_of: Measures a circuit.
        kept: The circuit. [readers, writers]
        changed: The edges. [readers, writers]

    Returns:
        What each adds to the circuit's metric, 0 elsewhere. [readers, writers]
    """
    before, effects = metric_of(kept), np.zeros(kept.shape)
    for edge in edge_list(changed):
        other = kept.copy()
        other[edge] = not kept[edge]
        effects[edge] = metric_of(other) - before
    return effects
