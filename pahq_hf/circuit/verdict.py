"""What a finished run says about its circuit: whether it does what the model does."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from pahq_hf.errors import CircuitError

logger = logging.getLogger(__name__)

# A circuit is poor when its faithfulness is further than this from 1, or its accuracy below this share of the
# full model's. Nothing else in the package judges.
FAITHFULNESS_WITHIN = 0.2
ACCURACY_FROM = 0.8
_WHOLE_FROM = 0.9  # of all edges

Kind = Literal["circuit", "empty", "disconnected", "whole"]


def faithfulness(value: float, full: float, empty: float) -> float | None:
    """`(m(C) - m(empty)) / (m(full) - m(empty))`; None when the task makes no difference at all."""
    return None if full == empty else (value - empty) / (full - empty) + 0.0  # no -0.0


@dataclass(frozen=True)
class Verdict:
    """A circuit measured in FP32 on the prompts it was found on, and what that says of it.

    Attributes:
        metric: Name of the minimised metric.
        value: The circuit's metric.
        full: The full model's metric.
        empty: The metric of no edges.
        accuracy: Top-1 accuracy of the circuit (`pahq_hf.evaluation.greedy_accuracy`).
        accuracy_full: Top-1 accuracy of the full model.
        has_answers: Whether accuracy counts right answers; else it is agreement with the full model.
        kept: Edges of the circuit.
        live: Kept edges on a path from `input` to `logits`.
        total: Edges of the graph.
        searched: Edges of the readers that were searched; None if all were, or in an earlier version.
        searched_kept: Kept edges of the searched readers; of other readers all edges are kept.
        nodes: Heads and MLPs of the circuit, where whole nodes were kept or removed.
        nodes_total: Heads and MLPs of the graph, there.
    """

    metric: str
    value: float
    full: float
    empty: float
    accuracy: float
    accuracy_full: float
    has_answers: bool
    kept: int
    live: int
    total: int
    searched: int | None = None
    searched_kept: int | None = None
    nodes: int | None = None
    nodes_total: int | None = None

    @property
    def part(self) -> str | None:
        """What of a partial search was kept; None if all readers were searched."""
        if self.searched is None or self.searched_kept is None:
            return None
        return (
            f"{self.searched_kept:,} of {self.searched:,} in the searched readers; all other edges are kept"
        )

    @property
    def faithfulness(self) -> float | None:
        """Share of the metric that the circuit recovers; None when no edges recover as much as all."""
        return faithfulness(self.value, self.full, self.empty)

    @property
    def dead(self) -> int:
        """Kept edges on no path from `input` to `logits`."""
        return self.kept - self.live

    @property
    def kind(self) -> Kind:
        """What the edge set is, whatever it measures."""
        if self.kept == 0:
            return "empty"
        if self.live == 0:
            return "disconnected"
        kept, of = self.kept, self.total
        if self.searched is not None and self.searched_kept is not None:
            kept, of = self.searched_kept, self.searched  # the others were not to be removed
        return "whole" if kept >= _WHOLE_FROM * of else "circuit"

    @property
    def kind_text(self) -> str | None:
        """What is to be said of the edge set; None if it is an ordinary circuit."""
        if self.kind == "whole":
            return f"{'' if self.kept == self.total else 'nearly '}the whole model"
        return {
            "empty": "an empty circuit",
            "disconnected": "no kept edge lies on a path from input to logits",
        }.get(self.kind)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the circuit is poor; empty if it is not."""
        found, faithful = [], self.faithfulness
        if faithful is None:
            found.append(f"{self.metric} is the same with all edges and with none")
        elif not abs(1 - faithful) <= FAITHFULNESS_WITHIN:
            found.append(
                f"faithfulness {faithful:.3f} is not within {FAITHFULNESS_WITHIN:g} of 1 ({self.metric} "
                f"{self.value:.3g}; {self.full:.3g} with all edges, {self.empty:.3g} with none)"
            )
        if self.accuracy < ACCURACY_FROM * self.accuracy_full:
            found.append(
                f"{self.accuracy_name} {self.accuracy:.3g} is below {ACCURACY_FROM:g} of the full model's "
                f"{self.accuracy_full:.3g}"
            )
        return tuple(found)

    @property
    def poor(self) -> bool:
        """Whether the circuit does not do what the model does."""
        return bool(self.reasons)

    @property
    def accuracy_name(self) -> str:
        """What `accuracy` is."""
        return "accuracy" if self.has_answers else "agreement with the full model"

    @property
    def headline(self) -> str:
        """What the circuit is, and why it is poor if it is."""
        parts = [self.kind_text] if self.kind_text else []
        if self.poor:
            parts.append("poor: " + "; ".join(self.reasons))
        return ", ".join(parts) or "faithful"

    @property
    def summary(self) -> str:
        """The verdict on one line."""
        faithful = "undefined" if self.faithfulness is None else f"{self.faithfulness:.3f}"
        part = "" if self.part is None else f"; {self.part}"
        nodes = (
            ""
            if None in (self.nodes, self.nodes_total)
            else f"{self.nodes:,} of {self.nodes_total:,} nodes, "
        )
        return (
            f"{nodes}{self.kept:,} of {self.total:,} edges ({self.dead:,} dead{part}), "
            f"faithfulness {faithful}, "
            f"{self.accuracy_name} {self.accuracy:.3g} (full model {self.accuracy_full:.3g}): {self.headline}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what was measured, and what follows from it."""
        return {
            "poor": self.poor,
            "kind": self.kind,
            "summary": self.summary,
            "reasons": list(self.reasons),
            "faithfulness": self.faithfulness,
            "dead": self.dead,
            **{
                field.name: getattr(self, field.name)
                for field in fields(self)
                if field.name not in _OF_NODES or getattr(self, field.name) is not None
            },
        }

    @classmethod
    def from_dict(cls, facts: object) -> Verdict:
        """Read what `to_dict` wrote; what follows from the measurements is derived anew.

        Raises:
            CircuitError: If a measurement is missing or is no number.
        """
        if not isinstance(facts, dict):
            raise CircuitError("a circuit's verdict does not hold an object")
        try:
            metric, has_answers = facts["metric"], facts["has_answers"]
            value, full, empty, accuracy, accuracy_full = (_number(facts[name]) for name in _MEASURED)
            kept, live, total = (_count(facts[name]) for name in ("kept", "live", "total"))
            optional = [facts.get(name) for name in ("searched", "searched_kept", *_OF_NODES)]
            counts = [None if count is None else _count(count) for count in optional]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CircuitError(f"a circuit's verdict is damaged: {error!r}") from error
        if not isinstance(metric, str) or not isinstance(has_answers, bool):
            raise CircuitError("a circuit's verdict is damaged: its metric or has_answers is of another type")
        measured = (value, full, empty, accuracy, accuracy_full)
        return cls(metric, *measured, has_answers, kept, live, total, *counts)


_OF_NODES = ("nodes", "nodes_total")  # in files only where there are some
_MEASURED = ("value", "full", "empty", "accuracy", "accuracy_full")


def _number(value: Any) -> float:
    found = float(value)
    if isinstance(value, (bool, str)) or not math.isfinite(found):
        raise ValueError(f"{value!r:.40} is no number")
    return found


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def announce(verdict: Verdict, of: str) -> None:
    """Log a verdict: as a warning if the circuit is poor, or is no part of the model at all.

    Args:
        verdict: The verdict.
        of: What the circuit was found by.
    """
    level = logging.INFO if verdict.kind == "circuit" and not verdict.poor else logging.WARNING
    logger.log(level, "%s: %s", of, verdict.summary)
