"""Which direction of a search found an edge, and what that says of it (docs/searches.md)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray

FoundBy = NDArray[np.uint8]  # who found each edge. [readers, writers]

_NOISING, _DENOISING = 1, 2
# Chen et al. 2025, arXiv 2505.10039.
GATES = {_NOISING: "AND", _DENOISING: "OR", _NOISING | _DENOISING: "ADDER"}


def found_by(noising: BoolArray, denoising: BoolArray) -> FoundBy:
    """Who found each edge.

    Args:
        noising: The circuit that noising found. [readers, writers]
        denoising: The one that denoising found. [readers, writers]
    """
    both: FoundBy = noising.astype(np.uint8) * _NOISING + denoising.astype(np.uint8) * _DENOISING
    return both


def fits(found: FoundBy, kept: BoolArray) -> bool:
    """Whether an array can say who found the edges of a circuit: those that nobody searched are nobody's."""
    return bool(found.max(initial=0) <= max(GATES)) and not ((found > 0) & ~kept).any()


def gate_counts(found: FoundBy) -> Mapping[str, int]:
    """How many edges there are of each kind."""
    return {gate: int((found == bits).sum()) for bits, gate in GATES.items()}
