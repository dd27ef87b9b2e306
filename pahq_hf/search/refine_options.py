"""Options of `refine`."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from pahq_hf.config import Criterion, Direction, check_choice, check_number
from pahq_hf.errors import ConfigError
from pahq_hf.search.kind import SearchOptions, check_direction, shifted, told

_GOALS = ("edges", "max_gap", "curve")
MOST_VALIDATION = 0.5
_MOST = 100.0  # standard deviations: scores differ by ten


@dataclass(frozen=True)
class RefineOptions(SearchOptions):
    """Options of `refine`.

    Attributes:
        edges: How many the circuit has at most: the nearest of the size is looked for.
        max_gap: How far the circuit's metric may be from the full model's, as a share of how far that of no
            edges is: the smallest circuit within it is looked for.
        curve: Keep all edges and rank them: the best k of the ranking are circuits of every size. Exactly one
            of `edges`, `max_gap` and `curve` is given.
        steps: Of learning, for each halving of the number of edges; 0 learns nothing, and refines the best
            edges by gradients averaged along the mask.
        rate: How far a score moves in a step, in standard deviations of where they start.
        noise: On the scores, at the beginning of each halving.
        minibatch: Prompt pairs of a step.
        learn_pairs: Prompt pairs that learning sees of a generated task, which draws what `task` lacks of
            them; of a task that is data, learning sees those that it has.
        validation: Share of the task's pairs that is kept back to judge circuits by. Where that is fewer than
            4 pairs none are, and circuits are judged by those that are searched; so they are at 0.
        seed: Of the noise, the pairs that judge, and those that are drawn.
        criterion: `gap`: what it brings down is how far the metric is from the full model's.
        direction: As of ACDC; `both` has up to twice as many edges.
    """

    edges: int | None = field(default=None, metadata=told("Keep so many edges at most.", min=1))
    max_gap: float | None = field(
        default=None,
        metadata=told(
            "The smallest circuit whose metric is no farther from the full model's than this share of how "
            "far the empty circuit's is."
        ),
    )
    curve: bool = field(
        default=False, metadata=told("Keep all edges, ranked: the best k are circuits of every size.")
    )
    steps: int = field(default=20, metadata=told("Steps of learning for each halving of the edges.", min=0))
    rate: float = field(default=0.05, metadata=told("How far scores move in a step of learning.", min=0))
    noise: float = field(default=0.3, metadata=told("Noise on the scores that are learned.", min=0))
    minibatch: int = field(default=16, metadata=told("Prompt pairs of a step of learning.", min=1))
    learn_pairs: int = field(
        default=256, metadata=told("Prompt pairs to learn from, where the task can draw more.", min=0)
    )
    validation: float = field(
        default=0.25,
        metadata=told("Share of the prompt pairs that is kept back to judge circuits by."),
    )
    seed: int = field(
        default=0,
        metadata=told("Seed of the noise, and of which pairs judge.", min=0, name="noise_seed"),
    )
    criterion: Criterion | None = field(default=None, metadata=told("gap, which it always is."))
    direction: Direction = field(default="noising", metadata=told("As of acdc."))

    def turned(self, *, more: bool, total: int) -> dict[str, Any] | None:
        """Options of another run that would keep more edges, or fewer.

        Args:
            more: Whether more are wanted.
            total: Edges of the graph.

        Returns:
            New values by name; None where nothing is known to help.
        """
        if self.edges is not None:
            edges = min(2 * self.edges, total) if more else max(1, total // 20)
            return None if edges == self.edges else {"edges": edges}
        if self.max_gap is None or (more and self.max_gap == 0):
            return None
        gap = shifted(self.max_gap, 1 / 3) if more else shifted(self.max_gap or 0.001, 3)
        return {"max_gap": gap} if gap < 1 else None

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        super().validate()
        check_direction(self.direction, self.ablation)
        if self.criterion is not None:
            check_choice("criterion", self.criterion, Criterion)
        if self.criterion not in (None, "gap"):
            raise ConfigError(f"refine brings the gap down: its criterion is gap, not {self.criterion}")
        asked = [
            name for name in _GOALS if getattr(self, name) is not None and getattr(self, name) is not False
        ]
        if len(asked) != 1:
            raise ConfigError(
                "refine takes exactly one of edges (--edges 200), max_gap (--max-gap 0.1) and curve "
                f"(--curve); got {' and '.join(asked) or 'none'}"
            )
        if type(self.curve) is not bool:
            raise ConfigError(f"curve must be true or false; got {self.curve!r}")
        if self.max_gap is not None:
            check_number("max_gap", self.max_gap)
            if not 0 <= self.max_gap < 1:
                raise ConfigError(f"max_gap must be a share from 0 to below 1; got {self.max_gap!r}")
        whole = {"edges": 1, "steps": 0, "minibatch": 1, "learn_pairs": 0, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is None and name in _GOALS:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
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
