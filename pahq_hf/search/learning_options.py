"""Options of searches that learn from prompt pairs, whatever they learn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from typing_extensions import Self

from pahq_hf.config import Criterion, Direction, PAHQConfig, check_choice, check_number
from pahq_hf.errors import ConfigError, MetricError
from pahq_hf.search.kind import SearchOptions, as_first, check_direction, told
from pahq_hf.tasks.metrics import find_metric

MOST_VALIDATION = 0.5
LEARN_PAIRS = 256


def other_size(edges: int, *, more: bool, total: int) -> dict[str, Any] | None:
    """Options of another run that would keep more edges, or fewer, of one that is told how many.

    Args:
        edges: How many it was told.
        more: Whether more are wanted.
        total: Edges of the graph.

    Returns:
        New values by name; None where there is no other number.
    """
    other = min(2 * edges, total) if more else max(1, total // 20)
    return None if other == edges else {"edges": other}


@dataclass(frozen=True)
class LearningOptions(SearchOptions):
    """Options of a search that learns from prompt pairs.

    Attributes:
        minibatch: Prompt pairs of a step.
        learn_pairs: Prompt pairs that learning sees of a generated task, which draws what `task` lacks of
            them; of a task that is data, learning sees those that it has.
        validation: Share of the task's pairs that is kept back to judge circuits by. Where that is fewer than
            4 pairs none are, and circuits are judged by those that are searched; so they are at 0.
        seed: Of what is drawn, the pairs that judge and those that are learned from among it.
        criterion: `gap`: what it brings down is how far the metric is from the full model's.
        direction: As of ACDC; `both` has up to twice as many edges.
    """

    search: ClassVar[str]  # whose options they are

    minibatch: int = field(default=8, metadata=told("Prompt pairs of a step of learning.", min=1))
    learn_pairs: int = field(
        default=LEARN_PAIRS, metadata=told("Prompt pairs to learn from, where the task can draw more.", min=0)
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

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        super().validate()
        check_direction(self.direction, self.ablation)
        if self.criterion is not None:
            check_choice("criterion", self.criterion, Criterion)
        if self.criterion not in (None, "gap"):
            raise ConfigError(
                f"{self.search} brings the gap down: its criterion is gap, not {self.criterion}"
            )
        for name, least in (("minibatch", 1), ("learn_pairs", 0), ("seed", 0)):
            check_number(name, getattr(self, name), whole=True, least=least)
        if self.ablation.startswith("mean") and self.learn_pairs not in (LEARN_PAIRS, 0):
            raise ConfigError(
                f"learn_pairs draws more pairs than are searched, and ablation {self.ablation} learns from "
                "those alone: their means would be others"
            )
        check_number("validation", self.validation)
        if not 0 <= self.validation <= MOST_VALIDATION:
            raise ConfigError(
                f"validation must be a share from 0 to {MOST_VALIDATION:g}, of the pairs that are kept back; "
                f"got {self.validation!r}"
            )

    def foresee(self, metric: str | None, precision: PAHQConfig) -> None:
        """Check what needs no model (`SearchKind.foresee`).

        Raises:
            MetricError: If the metric has no gradient.
        """
        if metric is not None and not find_metric(metric).differentiable:
            raise MetricError(f"metric {metric} has no gradient, by which {self.search} ranks edges")

    def settled(self, *, tests_all: bool) -> Self:
        """The options with what the graph decides.

        Args:
            tests_all: Whether it is so small that every edge can be tested.
        """
        return self

    @property
    def own_patience(self) -> int | None:
        """How many rounds may bring nothing, where it was said and ends something; None without rounds."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; there is one criterion."""
        values = as_first(super().to_dict())
        del values["criterion"]
        return values
