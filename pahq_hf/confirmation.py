"""Whether the hooks engine confirms what a search ended at, and how far two right engines may be apart."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pahq_hf.config import Ablation
from pahq_hf.errors import CircuitError, UnverifiedWarning

if TYPE_CHECKING:
    from pahq_hf.circuit import Circuit

_EPSILON = 2.0**-23  # of FP32: some families' softmax is in it whatever the model's dtype
# How many times independent errors: at most .6 was seen in random circuits of all families. With zeros for
# removed edges norms blow up what little is left: mostly below 9, but in a few circuits without bound.
_SAFETY = 4.0
_SAFETY_ZERO = 16.0
_MEASURED = ("final", "final_recomputed", "tolerance")


def logit_rounding(layers: int, largest: float, ablation: Ablation) -> float:
    """How far apart a logit may be that two engines compute in FP32.

    On its way to the logits the stream is added to twice a layer, normed, and multiplied by the unembedding.
    Each rounds at the size of what it rounds, and independent errors grow by the root of their number.

    Args:
        layers: Layers of the model.
        largest: The largest absolute value of a logit.
        ablation: What stands in for removed edges.

    Returns:
        The distance.
    """
    safety = _SAFETY_ZERO if ablation == "zero" else _SAFETY
    return safety * math.sqrt(2 * layers + 2) * _EPSILON * largest


@dataclass(frozen=True)
class Confirmation:
    """A circuit's metric by the engine of its search and by the hooks engine.

    Attributes:
        metric: The metric.
        final: As the search has it.
        recomputed: As the hooks engine finds it, at the search's precision.
        tolerance: How far apart rounding may bring them.
    """

    metric: str
    final: float
    recomputed: float
    tolerance: float

    @property
    def verified(self) -> bool:
        """Whether they agree."""
        return abs(self.final - self.recomputed) <= self.tolerance

    @property
    def text(self) -> str:
        """What there is to say of it."""
        found = f"{self.metric} {self.final:.8g} by the search and {self.recomputed:.8g} by the hooks engine"
        if self.verified:
            return f"{found}, equal within rounding ({self.tolerance:.1g})"
        return f"{found}, further apart than rounding explains ({self.tolerance:.1g})"

    @classmethod
    def of(cls, discovery: dict[str, Any]) -> Confirmation | None:
        """Read it from the facts of a run; None where a run says nothing of it.

        Raises:
            CircuitError: If the facts are damaged.
        """
        if "verified" not in discovery:
            return None
        try:
            return cls.of_metric(discovery["metric"])
        except (KeyError, TypeError, ValueError) as error:
            raise CircuitError(f"a circuit's facts of verification are damaged: {error!r}") from error

    @classmethod
    def of_metric(cls, facts: dict[str, Any]) -> Confirmation:
        """Read it from what a `Judge` measured."""
        final, recomputed, tolerance = (float(facts[name]) for name in _MEASURED)
        if not isinstance(facts["name"], str):  # one that is not registered here may be in another process
            raise TypeError("the name of a metric is no text")
        return cls(facts["name"], final, recomputed, tolerance)


def unverified_text(circuit: Circuit) -> str | None:
    """What a user is told, on one line, of a circuit that the hooks engine did not confirm; else None."""
    found = circuit.confirmation
    if found is None or found.verified:
        return None
    threshold = circuit.discovery.get("arguments", {}).get("threshold")
    where = f"tau {threshold:g}: " if isinstance(threshold, int | float) else ""
    return f"{where}the result is kept, but not verified: {found.text}; please report it"


def warn_unverified(circuit: Circuit) -> None:
    """Warn of a circuit that the hooks engine did not confirm."""
    text = unverified_text(circuit)
    if text is not None:
        warnings.warn(text, UnverifiedWarning, stacklevel=2)
