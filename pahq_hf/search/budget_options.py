"""What search `budget` is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from pahq_hf.config import check_number
from pahq_hf.errors import ConfigError
from pahq_hf.search.acdc_options import GreedyOptions
from pahq_hf.search.kind import told

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
            "With --search budget, where tau is inf unless given: how far the circuit's metric may end from "
            "the full model's, as a share of how far the empty circuit's is."
        ),
    )

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        super().validate()
        check_number("max_gap", self.max_gap)
        if not self.max_gap >= 0:
            raise ConfigError(f"max_gap must be a share >= 0, such as 0.1, or inf; got {self.max_gap}")

    def check_threshold(self) -> None:
        """Raise `ConfigError` when the threshold is out of range."""
        if not self.threshold >= 0:
            raise ConfigError(f"threshold must be a number >= 0 or inf; got {self.threshold}")
