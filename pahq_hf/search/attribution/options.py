"""What an attribution is asked for, and what a screen is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from pahq_hf.config import Ablation, JsonConfig, check_choice, check_metric_name, check_number
from pahq_hf.errors import ConfigError
from pahq_hf.search.kind import Unsaid, told

MethodName = Literal["eap", "eap-ig", "hisp", "exact", "random"]


@dataclass(frozen=True)
class AttributionConfig(JsonConfig):
    """How edges are scored, and which of them make the circuit (docs/semantics.md, section 7).

    Attributes:
        method: `eap`; `eap-ig`, with integrated gradients over the inputs; `hisp`, head importance; `exact`,
            every edge removed alone from the full model; `random`.
        metric: What is minimised; None takes the task's own.
        steps: Runs whose gradients `eap-ig` averages.
        topn: Keep so many edges; by default all, or those of the threshold.
        threshold: Keep edges with at least this score.
        absolute: Compare magnitudes of scores.
        ablation: What takes the place of a removed edge.
        seed: Of `random`.
    """

    method: MethodName = field(
        default=cast("MethodName", Unsaid("eap-ig")), metadata=told("How edges are scored.")
    )
    metric: str | None = None
    steps: int = field(default=5, metadata=told("Runs whose gradients eap-ig averages.", min=1))
    topn: int | None = field(default=None, metadata=told("Keep so many edges; all if unset.", min=1))
    threshold: float | None = field(
        default=None, metadata=told("Keep edges with at least this score, in place of --topn.")
    )
    absolute: bool = field(default=False, metadata=told("Compare magnitudes of scores."))
    ablation: Ablation = "corrupted"
    seed: int = field(
        default=0, metadata=told("Seed of the scores of method random.", min=0, name="score_seed")
    )

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        check_choice("method", self.method, MethodName)
        if self.metric is not None:
            check_metric_name(self.metric)
        check_choice("ablation", self.ablation, Ablation)
        for name in ("steps", "topn", "seed"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True)
        if self.threshold is not None:
            check_number("threshold", self.threshold)
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1; got {self.steps}")
        if self.topn is not None and self.threshold is not None:
            raise ConfigError("give either topn or a threshold, not both")
        if self.topn is not None and self.topn < 1:
            raise ConfigError(f"topn must be at least 1; got {self.topn}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"threshold must be a finite number; got {self.threshold}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0; got {self.seed}")


def parse_screen(text: str) -> tuple[MethodName, float]:
    """Method and fraction of a screen.

    Args:
        text: `METHOD:FRACTION`.

    Raises:
        ConfigError: If it is something else.
    """
    method, _, rest = text.partition(":")
    try:
        fraction = float(rest)
    except ValueError:
        fraction = math.nan
    for known in get_args(MethodName):
        if method == known and 0 < fraction <= 1:
            return known, fraction
    methods = ", ".join(get_args(MethodName))
    raise ConfigError(
        f"screen must be METHOD:FRACTION, such as eap-ig:0.1, with a method of {methods} and a fraction "
        f"above 0 and up to 1; got {text!r}"
    )
