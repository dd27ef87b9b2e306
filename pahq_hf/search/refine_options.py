"""Options of `refine`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from typing_extensions import Self

from pahq_hf.config import Level, PAHQConfig, check_number
from pahq_hf.errors import ConfigError
from pahq_hf.search.kind import LEVEL, check_level, check_regime, shifted, told
from pahq_hf.search.learning_options import LearningOptions, other_size

_GOALS = ("edges", "max_gap", "curve")
_PATIENCE = 3
_STEPS = 20  # of learning, for each halving
_MOST = 100.0  # standard deviations: scores differ by ten


@dataclass(frozen=True)
class RefineOptions(LearningOptions):
    """Options of `refine`, beside those of every search that learns.

    Attributes:
        edges: How many the circuit has at most: the nearest of the size is looked for.
        max_gap: How far the circuit's metric may be from the full model's, as a share of how far that of no
            edges is: the smallest circuit within it is looked for.
        curve: Keep all edges and rank them: the best k of the ranking are circuits of every size. Exactly one
            of `edges`, `max_gap` and `curve` is given.
        steps: Of learning, for each halving of the number of edges; 0 learns nothing, and refines the best
            edges by gradients averaged along the mask. None takes 20; but where the graph is so small that
            every edge can be tested, tests start from all, unless another option of learning is given.
        rate: How far a score moves in a step, in standard deviations of where they start.
        noise: On the scores, at the beginning of each halving.
        patience: Rounds at the size of `edges` that may bring nothing on the pairs that judge, one after the
            other, before it ends; 0 goes on until no swap helps on the pairs that are searched.
        level: `edge`, or `node`: `edges` counts whole heads and MLPs then, each with all its edges out.
    """

    search: ClassVar[str] = "refine"

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
    steps: int | None = field(
        default=None,
        metadata=told(
            "Steps of learning for each halving of the edges: 20, and none in graphs of at most 1,000 edges, "
            "which are all tested.",
            min=0,
        ),
    )
    rate: float = field(default=0.05, metadata=told("How far scores move in a step of learning.", min=0))
    noise: float = field(default=0.3, metadata=told("Noise on the scores that are learned.", min=0))
    patience: int = field(
        default=_PATIENCE,
        metadata=told("Rounds that may bring nothing on the pairs kept back, before it ends; 0: all.", min=0),
    )

    level: Level = field(default="edge", metadata=LEVEL)

    def settled(self, *, tests_all: bool) -> Self:
        """The options with the steps of learning; None where there are none, since every edge is tested."""
        mine = (self.rate, self.noise, self.minibatch, self.learn_pairs)
        usual = RefineOptions.rate, RefineOptions.noise, RefineOptions.minibatch, RefineOptions.learn_pairs
        if self.steps is not None or (tests_all and mine == usual):
            return self
        return replace(self, steps=_STEPS)

    @property
    def own_patience(self) -> int | None:
        """The patience, where it is another than usual and ends something."""
        return self.patience if self.patience not in (0, _PATIENCE) else None

    def turned(self, *, more: bool, total: int) -> dict[str, Any] | None:
        """Options of another run that would keep more edges, or fewer.

        Args:
            more: Whether more are wanted.
            total: Edges of the graph.

        Returns:
            New values by name; None where nothing is known to help.
        """
        if self.edges is not None:
            return other_size(self.edges, more=more, total=total)
        if self.max_gap is None or (more and self.max_gap == 0):
            return None
        gap = shifted(self.max_gap, 1 / 3) if more else shifted(self.max_gap or 0.001, 3)
        return {"max_gap": gap} if gap < 1 else None

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        super().validate()
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
        if self.steps is not None:
            check_number("steps", self.steps, whole=True, least=0)
        check_number("patience", self.patience, whole=True, least=0)
        if self.edges is not None:
            check_number("edges", self.edges, whole=True, least=1)
        check_number("rate", self.rate, least=0, most=_MOST)
        check_number("noise", self.noise, least=0, most=_MOST)
        check_level(self.level)
        if self.own_patience is not None and self.edges is None:
            goal = "curve" if self.curve else "max_gap"
            raise ConfigError(f"patience counts rounds at the size of edges, and {goal} has no such size")
        if self.own_patience is not None and self.validation == 0:
            raise ConfigError(
                "patience counts rounds on the pairs that are kept back, and validation 0 keeps none"
            )
        learning = [entry for entry in fields(self) if entry.name in ("rate", "noise")]
        for entry in learning if self.steps == 0 else []:
            if getattr(self, entry.name) != entry.default:
                raise ConfigError(f"{entry.name} is of steps of learning, and steps 0 takes none")

    def foresee(self, metric: str | None, precision: PAHQConfig) -> None:
        """Check what needs no model (`SearchKind.foresee`).

        Raises:
            ConfigError: If nodes cannot be tested in the precision.
            MetricError: If the metric has no gradient.
        """
        check_regime(self.level, precision)
        super().foresee(metric, precision)
