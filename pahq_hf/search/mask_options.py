"""Options of searches that learn a mask over all edges: `edge-pruning` and `ugs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from pahq_hf.config import check_number
from pahq_hf.errors import ConfigError
from pahq_hf.search.kind import told
from pahq_hf.search.learning_options import LearningOptions, other_size

_FASTEST = 100.0  # a step in the logit of a mask
_DEAREST = 1e6
_SCHEDULE = 3000  # steps of both papers


@dataclass(frozen=True)
class MaskOptions(LearningOptions):
    """Options of a search that learns a mask, beside those of every search that learns.

    Attributes:
        edges: How many the circuit has: those of the best masks.
        steps: Of learning.
        rate: How far the logit of a mask moves in a step.
    """

    edges: int | None = field(default=None, metadata=told("Keep exactly so many edges.", min=1))
    steps: int = field(default=_SCHEDULE, metadata=told("Steps of learning in all.", min=1))
    rate: float = field(default=0.01, metadata=told("How far logits of masks move in a step.", min=0))

    def turned(self, *, more: bool, total: int) -> dict[str, Any] | None:
        """Options of another run that would keep more edges, or fewer (`other_size`)."""
        assert self.edges is not None
        return other_size(self.edges, more=more, total=total)

    def longer(self) -> dict[str, Any]:
        """Options of another run, of more steps, where the masks of this one did not part."""
        return {"steps": max(_SCHEDULE, 10 * self.steps)}

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        super().validate()
        if self.edges is None:
            raise ConfigError(f"{self.search} keeps as many edges as it is told: give edges (--edges 200)")
        check_number("edges", self.edges, whole=True, least=1)
        check_number("steps", self.steps, whole=True, least=1)
        check_number("rate", self.rate, least=0, most=_FASTEST)


@dataclass(frozen=True)
class EdgePruningOptions(MaskOptions):
    """Options of `edge-pruning`; defaults are those of the authors for IOI on GPT-2.

    Attributes:
        rate: How far the log alpha of a mask, and a multiplier, moves in a step at most.
        minibatch: Prompt pairs of a step, all run under one draw of the masks.
    """

    search: ClassVar[str] = "edge-pruning"

    rate: float = field(default=0.8, metadata=told("How far log alphas move in a step at most.", min=0))
    minibatch: int = field(default=32, metadata=told("Prompt pairs of a step, under one mask.", min=1))


@dataclass(frozen=True)
class UGSOptions(MaskOptions):
    """Options of `ugs`; defaults are those of its author for counterfactual ablation.

    Attributes:
        minibatch: Prompt pairs of a step.
        samples: Masks of each pair in a step, every one drawn by itself.
        penalty: What an edge costs, in units of the metric.
    """

    search: ClassVar[str] = "ugs"

    minibatch: int = field(default=5, metadata=told("Prompt pairs of a step.", min=1))
    samples: int = field(default=12, metadata=told("Masks that are drawn for each pair of a step.", min=1))
    penalty: float = field(default=0.001, metadata=told("What an edge costs, in the metric's units.", min=0))

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        super().validate()
        check_number("samples", self.samples, whole=True, least=1)
        check_number("penalty", self.penalty, least=0, most=_DEAREST)
