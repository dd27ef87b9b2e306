"""What ACDC is asked for, and what it shares with other greedy searches."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from pahq_hf.circuit.graph import ReaderOrder
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
from pahq_hf.errors import ConfigError, MetricError
from pahq_hf.search.attribution.kinds import check_gradient
from pahq_hf.search.attribution.options import parse_screen
from pahq_hf.search.kind import (
    LEVEL,
    PRUNE,
    as_first,
    check_criterion,
    check_direction,
    check_level,
    check_regime,
    shifted,
    told,
)
from pahq_hf.tasks.metrics import find_metric

Tests = Literal["all", "verified"]
GreedyT = TypeVar("GreedyT", bound="GreedyOptions")
DEFAULT_AUDIT = 0.02


@dataclass(frozen=True)
class GreedyOptions(JsonConfig):
    """What every greedy search over edges is asked for (docs/semantics.md, section 3).

    Attributes:
        threshold: tau; an edge goes when its removal raises the metric by less than this.
        metric: What is minimised; None takes the task's own.
        order: Reader order.
        ablation: What takes the place of a removed edge.
        absolute: The same as criterion `absolute`.
        criterion: What of an edge is held against tau, when removing it takes the metric from `cur` to `new`:
            `signed`, `new - cur`; `absolute`, `|new - cur|`; `gap`, `|new - full| - |cur - full|`, how much
            farther it is then from the full model's. None is `signed`, or what `absolute` says.
        direction: `noising`: circuits run on clean prompts, removed edges carry corrupted activations.
            `denoising` searches with the two swapped; `both` keeps what either finds.
        readers: Comma-separated globs; only matching readers are searched, others keep all edges.
        level: `edge`, or `node`: whole heads and MLPs are kept or removed, each with all its edges out.
        prune_dead: Drop edges that lie on no path from `input` to `logits`, once all are decided; the
            circuit's metric is measured again.
        margin: Test an edge again in FP32 when its score is within `margin * threshold` of the threshold;
            `inf` tests every edge again. None takes the default of precision `pahq`; the other regimes
            have no second look.
    """

    endless: ClassVar[tuple[str, ...]] = ("threshold", "margin")  # options that may be infinite

    threshold: float = field(
        default=0.01, metadata=told("tau: an edge stays when removing it costs this much.")
    )
    metric: str | None = None
    order: ReaderOrder = field(default="acdc", metadata=told("Order in which readers are visited."))
    ablation: Ablation = "corrupted"
    absolute: bool = field(default=False, metadata=told("The same as --criterion absolute."))
    readers: str | None = field(
        default=None, metadata=told("Search only readers matching these globs, e.g. 'logits,m1*'.")
    )
    margin: float | None = field(
        default=None,
        metadata=told("Test again in FP32 what scores within margin x tau of tau; inf tests all again."),
    )
    criterion: Criterion | None = field(
        default=None,
        metadata=told(
            "What is held against tau of what a removal does to the metric: signed, what it adds; absolute, "
            "how far it moves it; gap, how much farther it takes it from the full model's. [signed]"
        ),
    )

    direction: Direction = field(
        default="noising",
        metadata=told(
            "noising: removed edges carry corrupted activations into the clean run; denoising: clean ones "
            "into the corrupted run; both: the edges that either finds."
        ),
    )
    level: Level = field(default="edge", metadata=LEVEL)
    prune_dead: bool = field(default=False, metadata=PRUNE)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "absolute", self.decides_by == "absolute")

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        check_number("threshold", self.threshold)
        if self.margin is not None:
            check_number("margin", self.margin)
        self.check_threshold()
        if self.metric is not None:
            check_metric_name(self.metric)
        check_choice("order", self.order, ReaderOrder)
        check_choice("ablation", self.ablation, Ablation)
        check_direction(self.direction, self.ablation)
        check_criterion(self.criterion, self.absolute)
        order = None if self.order == "acdc" else self.order
        check_level(self.level, readers=self.readers, margin=self.margin or None, order=order)
        if self.margin is not None and not self.margin >= 0:
            raise ConfigError(f"margin must be a number >= 0 or inf; got {self.margin}")

    def check_threshold(self) -> None:
        """Raise `ConfigError` when the threshold is out of range."""
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise ConfigError(f"threshold must be a finite number >= 0; got {self.threshold}")

    def foresee(self, metric: str | None, precision: PAHQConfig) -> None:
        """Check what needs no model (`SearchKind.foresee`).

        Raises:
            ConfigError: If there is a margin where there is no second look, or no component of a node's to
                raise.
        """
        check_regime(self.level, precision)
        if self.margin and precision.regime != "pahq":
            raise ConfigError(f"a margin needs precision pahq: in {precision.regime} there is no second look")

    def turned(self, *, more: bool, total: int) -> dict[str, Any] | None:
        """Options of another run that would keep more edges, or fewer.

        Args:
            more: Whether more are wanted.
            total: Edges of the graph.

        Returns:
            New values by name, None for one to leave away; None where nothing is known to help.
        """
        if not more:
            return {"threshold": shifted(self.threshold or 0.001, 3)}
        if self.threshold > 0:
            return {"threshold": shifted(self.threshold, 1 / 3)}
        # At tau 0 only what helps is removed: all of it together is what takes the metric away.
        left = dict.fromkeys(("threshold", "screen", "tests", "audit"))
        return {"search": "budget", "max_gap": 0.1, **left}

    @property
    def decides_by(self) -> Criterion:
        """The criterion, whichever option says it."""
        return self.criterion or ("absolute" if self.absolute else "signed")

    @property
    def estimates(self) -> bool:
        """Whether estimates decide edges too."""
        return False

    @property
    def audited(self) -> float:
        """Share of estimated edges that are drawn and tested."""
        return 0.0

    def stays(self, score: float) -> bool:
        """Whether an edge with this score is kept."""
        return (abs(score) if self.absolute else score) >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; JSON has no infinity."""
        values = as_first(asdict(self))
        if self.criterion != "gap":  # `absolute` tells the other two
            del values["criterion"]
        return values | {name: "inf" for name in self.endless if values[name] == math.inf}

    @classmethod
    def from_dict(cls: type[GreedyT], values: dict[str, Any]) -> GreedyT:
        """Build from `to_dict`'s output."""
        return super().from_dict(
            values | {name: math.inf for name in cls.endless if values.get(name) == "inf"}
        )


@dataclass(frozen=True)
class ACDCConfig(GreedyOptions):
    """How ACDC searches (docs/semantics.md, section 3).

    Attributes:
        screen: `METHOD:FRACTION`, such as `eap-ig:0.1`: score all edges by attribution first and test only
            this fraction of them, those with the largest magnitudes. The others are removed untested when
            their reader is visited. None tests all.
        tests: `all` tests every edge; `verified` decides most by estimates from the metric's slopes, whose
            sums are measured (docs/verified-estimates.md).
        audit: Share of estimated edges that are drawn at random and tested, more of few; 0 for none. None
            takes 2 % where there are estimates.
    """

    screen: str | None = field(
        default=None,
        metadata=told(
            "Test only the edges that attribution scores highest, e.g. eap-ig:0.1.", metavar="METHOD:FRACTION"
        ),
    )

    tests: Tests = field(
        default="all",
        metadata=told("Test all edges, or decide most by verified estimates: 5 to 10 times fewer tests."),
    )
    audit: float | None = field(
        default=None,
        metadata=told("With --tests verified: share of estimated edges that are drawn and tested. [2 %]"),
    )

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        super().validate()
        check_choice("tests", self.tests, Tests)
        if self.audit is not None:
            check_number("audit", self.audit)
            if not 0 <= self.audit <= 1:
                raise ConfigError(f"audit must be a share from 0 to 1; got {self.audit}")
            if self.tests == "all":
                raise ConfigError("an audit draws from estimated edges: it needs tests verified")
        if self.estimates and self.decides_by == "gap":
            raise ConfigError(
                "criterion gap needs tests all: estimates follow slopes, and those of the gap turn round "
                "where the metric passes the full model's"
            )
        if self.screen is not None:
            parse_screen(self.screen)
        check_level(self.level, screen=self.screen, tests=self.tests if self.estimates else None)

    def foresee(self, metric: str | None, precision: PAHQConfig) -> None:
        """Check what needs no model (`SearchKind.foresee`).

        Raises:
            ConfigError: If there is a margin where there is no second look.
            MetricError: If the screen's method means nothing for the metric, or estimates have no gradient.
        """
        super().foresee(metric, precision)
        if metric is None:
            return
        if self.screen is not None:
            check_gradient(parse_screen(self.screen)[0], metric)
        if self.estimates and not find_metric(metric).differentiable:
            raise MetricError(f"metric {metric} has no gradient, which estimates follow: use tests all")

    @property
    def estimates(self) -> bool:
        """Whether estimates decide edges too."""
        return self.tests == "verified"

    @property
    def audited(self) -> float:
        """Share of estimated edges that are drawn and tested."""
        return DEFAULT_AUDIT if self.audit is None else self.audit

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; JSON has no infinity, and most runs no screen."""
        values = super().to_dict()
        if self.screen is None:
            del values["screen"]
        if not self.estimates:
            del values["tests"], values["audit"]
        else:
            values["audit"] = self.audited
        return values
