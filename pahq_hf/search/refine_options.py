"""Options of `refine`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pahq_hf.config import Criterion, Direction, check_choice, check_number
from pahq_hf.errors import ConfigError
from pahq_hf.search.kind import SearchOptions, check_direction, told

MOST_VALIDATION = 0.5
_MOST = 100.0  # standard deviations: scores differ by ten


@dataclass(frozen=True)
class RefineOptions(SearchOptions):
    """Options of `refine`.

    Attributes:
        edges: How many the circuit has at most.
        steps: Of learning, for each halving of the number of edges; 0 learns nothing, and refines the best
            edges by gradients averaged along the mask.
        rate: How far a score moves in a step, in standard deviations of where they start.
        noise: On the scores, at the beginning of each halving.
        minibatch: Prompt pairs of a step.
        learn_pairs: Prompt pairs that learning sees of a generated task, which draws what `task` lacks of
            them; of a task that is data, learning sees those that it has.
        validation: Share of the task's pairs that is kept back to judge circuits by, at least 4 pairs; 0
            keeps none back, and judges by the pairs that are searched, as tasks of fewer than 12 pairs do.
        seed: Of the noise, the pairs that judge, and those that are drawn.
        criterion: `gap`: what it brings down is how far the metric is from the full model's.
        direction: As of ACDC; `both` has up to twice as many edges.
    """

    edges: int = field(default=200, metadata=told("refine: keep so many edges.", min=1))
    steps: int = field(
        default=20, metadata=told("refine: steps of learning for each halving of the edges.", min=0)
    )
    rate: float = field(
        default=0.05, metadata=told("refine: how far scores move in a step of learning.", min=0)
    )
    noise: float = field(default=0.3, metadata=told("refine: noise on the scores that are learned.", min=0))
    minibatch: int = field(default=16, metadata=told("refine: prompt pairs of a step of learning.", min=1))
    learn_pairs: int = field(
        default=256, metadata=told("refine: prompt pairs to learn from, where the task can draw more.", min=0)
    )
    validation: float = field(
        default=0.25,
        metadata=told("refine: share of the prompt pairs that is kept back to judge circuits by."),
    )
    seed: int = field(
        default=0,
        metadata=told("refine: seed of the noise, and of which pairs judge.", min=0, name="noise_seed"),
    )
    criterion: Criterion | None = field(default=None, metadata=told("refine: gap, which it always is."))
    direction: Direction = field(default="noising", metadata=told("refine: as of acdc."))

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        super().validate()
        check_direction(self.direction, self.ablation)
        if self.criterion is not None:
            check_choice("criterion", self.criterion, Criterion)
        if self.criterion not in (None, "gap"):
            raise ConfigError(f"refine brings the gap down: its criterion is gap, not {self.criterion}")
        whole = {"edges": 1, "steps": 0, "minibatch": 1, "learn_pairs": 0, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be a whole number from {least} on; got {value!r}")
        for name in ("rate", "noise"):
            check_number(name, getattr(self, name))
            if not 0 <= getattr(self, name) <= _MOST:
                raise ConfigError(f"{name} must be a number from 0 to {_MOST:g}; got {getattr(self, name)!r}")
        check_number("validation", self.validation)
        if not 0 <= self.validation <= MOST_VALIDATION:
            raise ConfigError(
                f"validation must be a share from 0 to {MOST_VALIDATION:g}, of the pairs that are kept back; "
                f"got {self.validation!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; there is one criterion."""
        left = {"criterion", *(["direction"] if self.direction == "noising" else [])}
        return {name: value for name, value in super().to_dict().items() if name not in left}
