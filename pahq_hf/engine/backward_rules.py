"""What backward passes do other than the derivative: the rules of GIM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BackwardRules:
    """Where a backward pass departs from the derivative; as it stands, nowhere.

    Attributes:
        temperature: The derivative of an attention's softmax is taken at scores divided by this.
        queries: Factor of the gradients of queries.
        keys: Of keys.
        values: Of values.
        gates: Of both factors of a gated MLP's product.
        norms: `frozen` passes gradients by norms as if their scale did not depend on what they read.
    """

    temperature: float = 1.0
    queries: float = 1.0
    keys: float = 1.0
    values: float = 1.0
    gates: float = 1.0
    norms: Literal["exact", "frozen"] = "exact"


DERIVATIVE = BackwardRules()
# Edin et al. 2025 (arXiv 2505.17630), with the factors and the temperature of the authors' code.
GIM = BackwardRules(temperature=2.0, queries=0.25, keys=0.25, values=0.5, gates=0.5, norms="frozen")
