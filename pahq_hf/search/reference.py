"""What gaps are measured from, where edges are decided by the gap `|m(C) - m(full)|` (docs/searches.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.protocol import Engine
from pahq_hf.search.work import Work


@dataclass(frozen=True)
class Reference:
    """The full model's metric.

    Attributes:
        full: As circuits are measured.
        raises: Whether tests have a component in FP32 that circuits do not have, so that the two differ.
    """

    full: float
    raises: bool = False

    @classmethod
    def of(cls, work: Work[Any], full: float) -> Reference:
        """The reference of a search."""
        return cls(full, work.setting.precision.regime == "pahq-literal")

    @classmethod
    def kept(cls, work: Work[Any]) -> Reference:
        """The reference of a search whose journal begins with it; a new one measures and keeps it.

        Raises:
            RunError: If the journal of an interrupted run does not begin so.
        """
        if work.steps:
            found: object = work.steps[0].get("full")
            if not isinstance(found, float) or not math.isfinite(found):
                raise work.damaged(1, ": it does not have the metric of all edges")
            return cls.of(work, found)
        full = work.engine.metric_of(work.graph.all_edges)
        work.keep({"full": full})
        return cls.of(work, full)

    def seen(self, engine: Engine, kept: BoolArray, cur: float) -> float:
        """The full model's metric as tests of a reader would have it.

        Args:
            engine: What tests; the reader is in its focus.
            kept: The circuit that they start from. [readers, writers]
            cur: Its metric in them.
        """
        return self.full - (engine.metric_of(kept) - cur) if self.raises else self.full
