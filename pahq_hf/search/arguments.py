"""Keyword arguments that the searches and judgements of `PAHQModel` take, by name and type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from pahq_hf.checkpoint.arguments import PRECISION_KEYWORDS
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import ReaderOrder
from pahq_hf.config import Ablation, Criterion, Direction, EngineConfig, Level
from pahq_hf.errors import ConfigError, check_names, describe
from pahq_hf.search.acdc_options import Tests
from pahq_hf.search.attribution.kinds import MethodName
from pahq_hf.search.kind import Options, OptionsT, SearchKind
from pahq_hf.search.registry import advice_on
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.own_metric import OwnMetric, with_named_metric


class SweepOptions(TypedDict, total=False):
    """Fields of `ACDCConfig` but for the threshold."""

    metric: str | OwnMetric | None
    order: ReaderOrder
    ablation: Ablation
    absolute: bool
    readers: str | None
    margin: float | None
    screen: str | None
    tests: Tests
    audit: float | None
    criterion: Criterion | None
    level: Level
    prune_dead: bool


class DiscoverOptions(SweepOptions, total=False):
    """Fields of `ACDCConfig`."""

    threshold: float
    direction: Direction


class AttributeOptions(TypedDict, total=False):
    """Fields of `AttributionConfig`."""

    method: MethodName
    metric: str | OwnMetric | None
    steps: int
    topn: int | None
    threshold: float | None
    absolute: bool
    ablation: Ablation
    seed: int
    criterion: Criterion | None
    members: str
    direction: Direction
    level: Level
    prune_dead: bool


class EvaluateOptions(TypedDict, total=False):
    """Fields of `evaluation.EvaluationOptions`."""

    curve: bool
    minimality: bool
    completeness: bool
    samples: int
    seed: int
    reference: Circuit | None
    audit: int


_AT_LOADING = "precision is chosen when the model is loaded: PAHQModel.from_pretrained(..., {}=...)"
_ENGINE = "the engine is described by engine=EngineConfig({}=...)"
_WORK_HINTS = {
    **{name: _AT_LOADING.format(name) for name in (*PRECISION_KEYWORDS, "device", "dtype", "base_model")},
    **{name: _ENGINE.format(name) for name in ("batch", "memory_budget", "activation_store")},
    "n": "prompts are chosen with the task: load_task(..., n=...)",
    "bootstrap": "discover alone takes it: model.discover(task, bootstrap=...)",
    "tau": "did you mean 'threshold'?",
}


def check_work(
    options: Mapping[str, Any],
    known: Iterable[str],
    method: str,
    advice: Mapping[str, str] | None = None,
    **objects: tuple[object, type],
) -> None:
    """Check what a method of `PAHQModel` was given.

    Args:
        options: Its keyword arguments.
        known: The names there are.
        method: Its name.
        advice: What to do instead of some that are unknown, by name.
        **objects: Configurations by the names of their arguments, and the classes they must have.

    Raises:
        ConfigError: If a name is unknown, or a configuration is something else.
    """
    check_names(options, list(known), method, {**(advice or {}), **_WORK_HINTS})
    for name, (value, kind) in objects.items():
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} must be an instance of {kind.__name__}; got {value!r}")


def check_task(task: object, method: str) -> None:
    """Check that a method of `PAHQModel` was given a task.

    Raises:
        ConfigError: If it is something else, such as a task's name.
    """
    if not isinstance(task, Task):
        raise ConfigError(f"{method} takes a Task (load_task(...)); got {describe(task)}")


def wanted_options(
    kind: SearchKind[OptionsT],
    task: Task,
    config: Options | None,
    engine: EngineConfig | None,
    given: Mapping[str, Any],
    method: str,
) -> OptionsT:
    """The options of a search, from either form of them; all that was given is checked.

    Args:
        kind: The search.
        task: What was given as the task.
        config: The options as an object, or None.
        engine: What was given as the engine's configuration.
        given: The options as keywords.
        method: Of `PAHQModel`: `discover` or `sweep`.

    Raises:
        ConfigError: If something is not what it must be.
    """
    where = f"search {kind.name!r} of {method}" if method == "discover" else method
    given = with_named_metric(given)
    advice, known = advice_on(kind) if method == "discover" else None, kind.fields
    check_work(given, known, where, advice, config=(config, kind.options), engine=(engine, EngineConfig))
    check_task(task, method)
    if config is not None and given:
        raise ConfigError("give either config or its fields as keywords, not both")
    return kind.settled(config) if isinstance(config, kind.options) else kind.make_options(given)
