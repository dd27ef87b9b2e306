"""What a search algorithm is to the run pipeline: a name, options, and a function.

The function is given a `Work`, which says what is asked for and has what a search needs, and returns what it
`Found`. All the rest is the pipeline's: folder and lock, journal, verification, record, files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.gates import FoundBy
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.nodes import ScoredNodes
from pahq_hf.circuit.run_record import RunRecord
from pahq_hf.config import (
    Ablation,
    Criterion,
    Direction,
    JsonConfig,
    Level,
    PAHQConfig,
    check_choice,
    check_metric_name,
)
from pahq_hf.errors import ConfigError, check_names, code_of, describe

if TYPE_CHECKING:  # a kind is known before torch is
    from pahq_hf.engine.setting import Setting
    from pahq_hf.search.work import Work

logger = logging.getLogger(__name__)
# Fields of a record that a search fills.
TOLD_FACTS = ("second_looks", "estimates", "screen", "resumed_readers")


class Options(Protocol):
    """Options of any search: a frozen dataclass with these fields among others."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def metric(self) -> str | None:
        """What is minimised; None takes the task's own."""

    @property
    def ablation(self) -> Ablation:
        """What stands in for removed edges."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values by name."""


def told(
    help: str, *, metavar: str | None = None, min: float | None = None, name: str | None = None
) -> Mapping[str, Any]:
    """What the command line says of an option: the `metadata` of its field.

    Args:
        help: What it is.
        metavar: What stands for its value in the help.
        min: The least value.
        name: Its name on the command line, where another option has its own.
    """
    facts = {"help": help, "metavar": metavar, "min": min, "name": name}
    return {key: value for key, value in facts.items() if value is not None}


LEVEL = told(
    "edge: single edges are kept or removed; node: whole heads and MLPs, each with all its edges out."
)


PRUNE = told("Drop the edges that lie on no path from input to logits, once all are decided.")


def check_direction(direction: Direction, ablation: Ablation) -> None:
    """Check a direction against what stands in for removed edges.

    Raises:
        ConfigError: If it is none, or there is nothing to swap.
    """
    check_choice("direction", direction, Direction)
    if direction != "noising" and ablation != "corrupted":
        raise ConfigError(
            f"direction {direction} swaps clean and corrupted prompts, which needs ablation corrupted; got "
            f"{ablation}"
        )


def check_criterion(criterion: Criterion | None, absolute: bool) -> None:
    """Check a criterion against `absolute`, its older form.

    Raises:
        ConfigError: If it is none, or they say different things.
    """
    if criterion is not None:
        check_choice("criterion", criterion, Criterion)
    if absolute and criterion not in (None, "absolute"):
        raise ConfigError(f"absolute is criterion absolute: leave it out, or criterion {criterion}")


def check_level(level: Level, **others: object) -> None:
    """Check what is kept or removed against options that are about edges.

    Args:
        level: What is kept or removed.
        **others: Values of such options by name; None where nothing is asked for.

    Raises:
        ConfigError: If it is none, or one of them means nothing for whole nodes.
    """
    check_choice("level", level, Level)
    for name, value in others.items():
        if level == "node" and value is not None:
            raise ConfigError(f"level node has no {name}: {_NO_NODES[name]}")


def check_regime(level: Level, precision: PAHQConfig) -> None:
    """Check that what is kept or removed can be tested in a precision.

    Raises:
        ConfigError: If it is nodes, and the precision is about the component under test.
    """
    if level == "node" and precision.regime == "pahq-literal":
        raise ConfigError(
            "precision pahq-literal raises what reads the edge under test, and a node goes with edges into "
            "many: at level node use pahq, fp32 or rtn"
        )


_NO_NODES = {
    "readers": "they choose among edges, and a node goes with all of its edges out",
    "order": "nodes are visited from the output to the input, and there are no readers to put in order",
    "margin": "a test of a node measures the whole circuit, in FP32 where edges have second looks",
    "screen": "there are few nodes, and all are tested",
    "tests": "there are few nodes, and all are tested; estimates are of edges",
}


def as_first(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options without those that every run had before there were others.

    Files and journals of such runs are the same, then, as those of the versions that had no such option.
    """
    return {name: value for name, value in values.items() if name not in FIRST or value != FIRST[name]}


FIRST = {"direction": "noising", "level": "edge", "prune_dead": False}


def shifted(value: float, factor: float) -> float:
    """A value of an option by a factor, short enough to type."""
    return float(f"{value * factor:.2g}")


class Unsaid(str):
    """A default that can be told from the same value when somebody gives it."""

    __slots__ = ()


@dataclass(frozen=True)
class SearchOptions(JsonConfig):
    """A beginning for the options of a search of one's own: a frozen dataclass that adds fields to these.

    Every field is an option of the command line too; with `metadata=told(...)` it says what it is.

    Attributes:
        metric: What is minimised; None takes the task's own.
        ablation: What takes the place of a removed edge.
    """

    metric: str | None = None
    ablation: Ablation = "corrupted"

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range; whoever adds fields adds their checks."""
        check_choice("ablation", self.ablation, Ablation)
        if self.metric is not None:
            check_metric_name(self.metric)


OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found, before it is measured.

    Attributes:
        kept: Edges of the circuit. [readers, writers]
        scores: The score of every edge; 0 where there is none. [readers, writers]
        tested: Edges whose score was measured, or estimated. [readers, writers]
        final: The circuit's metric by the search's engine; None has that engine measure it, if there is one.
        searched: Readers that were searched, where others keep all edges whatever they are. [readers]
        facts: What the search says of itself in discovery.json.
        label: What tells it from others in a log; None has its verdict not logged.
        estimated: Tested edges whose score is an estimate; None if the search takes none. [readers, writers]
        found_by: Which direction found each edge, of a search in both. [readers, writers]
        nodes: Where whole nodes were kept or removed, which; the pipeline fills it.
    """

    kept: BoolArray
    scores: NDArray[np.float64]
    tested: BoolArray
    final: float | None = None
    searched: BoolArray | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = ""
    estimated: BoolArray | None = None
    found_by: FoundBy | None = None
    nodes: ScoredNodes | None = None

    def recordable(self, told: Iterable[str] = ()) -> dict[str, Any]:
        """Facts that the record of a run can hold; of the others there is a warning.

        Args:
            told: Fields of the record that the search may fill.
        """
        own = RunRecord.names() - {*told}
        left = {name: "the record has a field of that name" for name in self.facts if name in own}
        left |= {name: "it is no JSON" for name, value in self.facts.items() if not _is_json(value)}
        for name, reason in left.items():
            logger.warning("fact %r of the search is left out of the record: %s", name, reason)
        return {name: value for name, value in self.facts.items() if name not in left}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True)
class SearchKind(Generic[OptionsT]):
    """A search algorithm.

    Attributes:
        name: What it is called: `acdc`.
        title: What it is, in words.
        options: Its options, a frozen dataclass.
        function: The search.
        ranks_kept_first: Whether kept edges rank before all others: a greedy search's scores of the two do
            not compare.
        fixed: Options that the name decides.
        phase: What its seconds count for.
        command: The command of `pahq` that runs it; None if it is for Python alone.
        resolve: Checks options against a setting before any work, and gives them with what is decided only
            there.
        check: Checks a finished circuit against the journal of its search.
        is_own: Whether it is somebody's own, not the package's.
        without: Options that it has no use for, though others with the same class have.
        in_batches: Whether it tries candidates side by side (`EngineConfig.batch`).
    """

    name: str
    title: str
    options: type[OptionsT]
    function: Callable[[Work[OptionsT]], Found]
    ranks_kept_first: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    phase: str = "search"
    command: str | None = "discover"
    resolve: Callable[[OptionsT, Setting], OptionsT] | None = None
    check: Callable[[Work[OptionsT], Found], None] | None = None
    is_own: bool = False
    without: frozenset[str] = frozenset()
    in_batches: bool = True

    def direction_of(self, options: OptionsT) -> Direction:
        """In which direction it searches; somebody's own search knows one."""
        return "noising" if self.is_own else getattr(options, "direction", "noising")

    @property
    def told_facts(self) -> tuple[str, ...]:
        """Fields of a record that it may fill: they have a form, which searches of the package know."""
        return () if self.is_own else TOLD_FACTS

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the options that can be given."""
        left = {*self.fixed, *self.without}
        return tuple(entry.name for entry in fields(self.options) if entry.name not in left)

    def make_options(self, values: Mapping[str, Any]) -> OptionsT:
        """Options by name.

        Raises:
            ConfigError: If one is unknown or out of range.
        """
        check_names(values, self.fields, f"search {self.name!r}")
        given = {**values, **self.fixed}
        for entry in fields(self.options):
            required = entry.init and entry.default is MISSING and entry.default_factory is MISSING
            if required and entry.name not in given:
                raise ConfigError(f"search {self.name!r} needs option {entry.name!r}, which has no default")
        with self.running():
            return self.options(**given)

    def foresee(self, options: OptionsT, metric: str | None, precision: PAHQConfig) -> None:
        """Check options against what is known before there is a model.

        Args:
            options: The options.
            metric: Name of the metric; None where only the data will tell.
            precision: How weights will be kept.

        Raises:
            ConfigError: If one cannot be.
            MetricError: If one means nothing for the metric.
        """
        if not self.is_own and hasattr(options, "foresee"):
            options.foresee(metric, precision)

    def resolved(self, options: OptionsT, setting: Setting) -> OptionsT:
        """Options, checked against a setting and for what a journal can hold.

        Raises:
            ConfigError: If one cannot be.
        """
        with self.running():
            options = options if self.resolve is None else self.resolve(options, setting)
            values: Any = options.to_dict() if isinstance(options, self.options) else options
        what = f"search {self.name!r}"
        if not isinstance(options, self.options):
            raise ConfigError(f"{what} must resolve to {self.options.__name__}; got {describe(options)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{what}: to_dict of its options must give a dict; got {describe(values)}")
        for name, value in values.items():
            if not (isinstance(name, str) and _is_json(value)):
                raise ConfigError(
                    f"{what}: its option {name!r} is no JSON, which the journal holds ({describe(value)}); "
                    "give a string or numbers, or let to_dict do so"
                )
        return options

    def running(self) -> AbstractContextManager[None]:
        """Where the search's own code runs: what it raises is known for its own."""
        return code_of(f"search {self.name!r}") if self.is_own else nullcontext()

    def settled(self, options: OptionsT) -> OptionsT:
        """The same options with what the name decides.

        Raises:
            ConfigError: If they say otherwise.
        """
        for name, value in self.fixed.items():
            said = getattr(options, name)
            if said != value and not isinstance(said, Unsaid):
                raise ConfigError(
                    f"search {self.name!r} has {name} {value!r}, its config {said!r}: leave {name} out of it"
                )
        return self.options(**{**_values(options), **self.fixed}) if self.fixed else options

    def with_option(self, options: OptionsT, name: str, value: object) -> OptionsT:
        """The same options but for one."""
        return self.options(**{**_values(options), name: value})


def _values(options: Options) -> dict[str, Any]:
    return {entry.name: getattr(options, entry.name) for entry in fields(options)}


def check_options(options: object, name: str) -> None:
    """Check that a class can be a search's options.

    Raises:
        ConfigError: If it is no frozen dataclass, or lacks what every search has.
    """
    if not (isinstance(options, type) and is_dataclass(options)):
        raise ConfigError(f"the options of search {name!r} must be a dataclass; got {options!r}")
    if not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ConfigError(f"the options of search {name!r}, {options.__name__}, must be frozen")
    known = {entry.name for entry in fields(options)}
    if not {"metric", "ablation"} <= known or not hasattr(options, "to_dict"):
        raise ConfigError(
            f"the options of search {name!r}, {options.__name__}, must have metric, ablation and to_dict: "
            "derive them from SearchOptions"
        )
