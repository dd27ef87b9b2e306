"""Whether the hooks engine confirms what a search ended at, and how far two right engines may be apart."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from pahq_hf.errors import UnverifiedWarning

_EPSILON = 2.0**-23  # of FP32: some families' softmax is in it whatever the model's dtype
# How many times independent errors: at most .6 was seen in random circuits of all families. With zeros for
# removed edges norms blow up what little is left: mostly below 9, but in a few circuits without bound.
_SAFETY = 4.0
_SAFETY_ZERO = 16.0


def logit_rounding(layers: int, largest: float, ablation: str) -> float:
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


def warn_unverified(doubt: str | None) -> None:
    """Warn of a circuit that the hooks engine did not confirm.

    Args:
        doubt: `RunRecord.doubt`; where that is None there is nothing to warn of.
    """
    if doubt is not None:
        warnings.warn(doubt, UnverifiedWarning, stacklevel=2)
