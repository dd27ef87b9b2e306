"""What an attribution is asked for, and what a screen is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from pahq_hf.config import (
    Ablation,
    Criterion,
    Direction,
    JsonConfig,
    Level,
    PAHQConfig,
    check_choice,
    check_metric_name,
    check_number,
)
from pahq_hf.errors import ConfigError
from pahq_hf.search.attribution.kinds import (
    MEMBERS,
    METHODS,
    OWN,
    MethodName,
    check_gradient,
    check_own,
    methods_of,
    parse_members,
)
from pahq_hf.search.kind import (
    LEVEL,
    PRUNE,
    Unsaid,
    as_first,
    check_criterion,
    check_direction,
    check_level,
    check_regime,
    told,
)


@dataclass(frozen=True)
class AttributionConfig(JsonConfig):
    """How edges are scored, and which of them make the circuit (docs/semantics.md, section 7).

    Attributes:
        method: `eap`; `eap-ig`, with integrated gradients over the inputs; `eap-ig-activations`, over what
            the edge's writer writes; `clean-corrupted`, the mean of the gradients at both runs; `gim`, with
            the backward rules of GIM; `hisp`, head importance; `exact`, every edge removed alone from the
            full model; `random`; `ensemble`, the mean of others.
        metric: What is minimised; None takes the task's own.
        steps: Runs whose gradients `eap-ig` averages, and `eap-ig-activations` for each writer.
        topn: Keep so many edges; by default all, or those of the threshold.
        threshold: Keep edges with at least this score.
        absolute: The same as criterion `absolute`.
        ablation: What takes the place of a removed edge.
        seed: Of `random`.
        criterion: By what of scores edges are chosen: `signed`, as they are; `absolute`, their size; `gap`,
            how far removing the edge alone takes the metric from the full model's, which is their size too.
            None is `signed`, or what `absolute` says.
        members: Methods that `ensemble` takes the mean of, with commas between them.
        direction: As of ACDC: `noising` scores edges of the clean run, `denoising` of the corrupted one.
        prune_dead: Drop chosen edges that lie on no path from `input` to `logits`.
    """

    method: MethodName = field(
        default=cast("MethodName", Unsaid("eap-ig")), metadata=told("How edges are scored.")
    )
    metric: str | None = None
    steps: int = field(
        default=5, metadata=told("Runs whose gradients eap-ig and eap-ig-activations average.", min=1)
    )
    topn: int | None = field(default=None, metadata=told("Keep so many edges; all if unset.", min=1))
    threshold: float | None = field(
        default=None, metadata=told("Keep edges with at least this score, in place of --topn.")
    )
    absolute: bool = field(default=False, metadata=told("The same as --criterion absolute."))
    ablation: Ablation = "corrupted"
    seed: int = field(
        default=0, metadata=told("Seed of the scores of method random.", min=0, name="score_seed")
    )
    criterion: Criterion | None = field(
        default=None,
        metadata=told(
            "By what of scores edges are chosen: signed, as they are; absolute or gap, by size: how far "
            "the metric is from the full model's without the edge. [signed]"
        ),
    )

    members: str = field(
        default=MEMBERS,
        metadata=told("Methods that method ensemble takes the mean of.", metavar="METHOD,METHOD..."),
    )
    direction: Direction = field(
        default="noising",
        metadata=told(
            "noising: edges of the clean run are scored; denoising: of the corrupted run; both: the edges "
            "that either chooses."
        ),
    )
    level: Level = field(default="edge", metadata=LEVEL)
    prune_dead: bool = field(default=False, metadata=PRUNE)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "absolute", self.absolute or self.criterion == "absolute")

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        check_choice("method", self.method, MethodName)
        if self.metric is not None:
            check_metric_name(self.metric)
        check_choice("ablation", self.ablation, Ablation)
        check_direction(self.direction, self.ablation)
        check_criterion(self.criterion, self.absolute)
        check_level(self.level)
        parse_members(self.members)
        defaults = {entry.name: entry.default for entry in fields(self)}
        values = {name: getattr(self, name) for name in OWN}
        check_own(
            self.method,
            self.members,
            {name: value for name, value in values.items() if value != defaults[name]},
        )
        if self.method in ("random", "ensemble") and self.criterion == "gap":
            raise ConfigError(
                f"criterion gap means nothing for method {self.method}, whose scores are of no metric"
            )
        if self.method == "random" and self.direction != "noising":
            raise ConfigError(f"direction {self.direction} means nothing for method random: it runs nothing")
        check_number("steps", self.steps, whole=True, least=1)
        check_number("seed", self.seed, whole=True, least=0)
        if self.topn is not None:
            check_number("topn", self.topn, whole=True, least=1)
        if self.threshold is not None:
            check_number("threshold", self.threshold)
            if not math.isfinite(self.threshold):
                raise ConfigError(f"threshold must be a finite number; got {self.threshold}")
        if self.topn is not None and self.threshold is not None:
            raise ConfigError("give either topn or a threshold, not both")

    def foresee(self, metric: str | None, precision: PAHQConfig) -> None:
        """Check what needs no model (`SearchKind.foresee`).

        Raises:
            MetricError: If the method means nothing for the metric.
            ConfigError: If it removes nodes, and the precision is about the component under test.
        """
        if self.has_engine:
            check_regime(self.level, precision)
        for method in methods_of(self.method, self.members):
            if metric is not None:
                check_gradient(method, metric)

    @property
    def has_engine(self) -> bool:
        """Whether an engine measures circuits for it."""
        return any(METHODS[method].has_engine for method in methods_of(self.method, self.members))

    @property
    def by_size(self) -> bool:
        """Whether edges are chosen by the size of their scores."""
        return self.absolute or self.criterion == "gap"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values, without what it says in another way or does not use."""
        values = as_first(asdict(self))
        if self.criterion != "gap":
            del values["criterion"]
        if self.method != "ensemble":
            del values["members"]
        return values


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
    for known in METHODS:
        if method == known and 0 < fraction <= 1:
            return known, fraction
    methods = ", ".join(METHODS)
    raise ConfigError(
        f"screen must be METHOD:FRACTION, such as eap-ig:0.1, with a method of {methods} and a fraction "
        f"above 0 and up to 1; got {text!r}"
    )
