"""What search `budget` is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pahq_hf.config import check_number
from pahq_hf.errors import ConfigError
from pahq_hf.search.acdc_options import GreedyOptions
from pahq_hf.search.kind import shifted, told

DEFAULT_GAP = 0.1


@dataclass(frozen=True)
class BudgetOptions(GreedyOptions):
    """How a search with a budget decides (docs/semantics.md, section 3).

    Attributes:
        threshold: tau, as ACDC's; by default there is none, and the budget alone decides.
        max_gap: How far the circuit's metric may end from the full model's, as a share of how far that of no
            edges is; `inf` has no such bound, which is ACDC.
    """

    endless: ClassVar[tuple[str, ...]] = (*GreedyOptions.endless, "max_gap")

    threshold: float = field(
        default=math.inf, metadata=told("tau: an edge stays when removing it costs this much.")
    )
    max_gap: float = field(
        default=DEFAULT_GAP,
        metadata=told(
            "How far the circuit's metric may end from the full model's, as a share of how far the empty "
            "circuit's is; tau is inf there unless given."
        ),
    )

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        super().validate()
        check_number("max_gap", self.max_gap)
        if not self.max_gap >= 0:
            raise ConfigError(f"max_gap must be a share >= 0, such as 0.1, or inf; got {self.max_gap}")

    def turned(self, *, more: bool, total: int) -> dict[str, Any] | None:
        """Options of another run that would keep more edges, or fewer (`GreedyOptions.turned`)."""
        if not more and self.max_gap < math.inf:
            return {"max_gap": shifted(self.max_gap or 0.001, 3)}
        if not more:
            return {"threshold": shifted(self.threshold or 0.001, 3)} if self.threshold < math.inf else None
        if self.max_gap == 0:
            return None
        return {"max_gap": DEFAULT_GAP if self.max_gap == math.inf else shifted(self.max_gap, 1 / 3)}

    def check_threshold(self) -> None:
        """Raise `ConfigError` when the threshold is out of range."""
        if not self.threshold >= 0:
            raise ConfigError(f"threshold must be a number >= 0 or inf; got {self.threshold}")
