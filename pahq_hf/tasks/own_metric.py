"""A function of logits given as a metric: registered under its own name, by which files know it."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from pahq_hf.errors import ConfigError, describe
from pahq_hf.tasks.metric_spec import MetricSpec
from pahq_hf.tasks.metrics import is_built_in, register_metric

if TYPE_CHECKING:
    from torch import Tensor

    from pahq_hf.tasks.targets import Targets

# One value a row, smaller is better: of logits, or of logits and targets. [rows, vocab] -> [rows]
OwnMetric = Callable[..., "Tensor"]


def metric_name(metric: str | OwnMetric | None) -> str | None:
    """The name of a metric; a function is registered under its own.

    Args:
        metric: A name, or a function of the logits at the scored positions, in float64, and if it takes two
            arguments of what they are compared with (`Targets`). It gives one value a row, which is
            minimised. [rows, vocab] -> [rows]

    Returns:
        The name, `own-` before it where that of the function is a built-in metric's; of a lambda `lambda-`
        and digits of what it computes, so that a run continued with another one is another run.

    Raises:
        ConfigError: If it is neither.
    """
    if metric is None or isinstance(metric, str):
        return metric
    if not callable(metric):
        raise ConfigError(f"metric takes a name or a function of logits; got {describe(metric)}")
    told = vars(metric).get("__name__") if not inspect.isroutine(metric) else metric.__name__
    name = re.sub(r"[^a-z0-9_-]+", "-", str(told or type(metric).__name__).lower()).strip("-_") or "metric"
    if isinstance(metric, FunctionType) and told == "<lambda>":
        name = f"lambda-{_digest(metric.__code__).hexdigest()[:8]}"
    if is_built_in(name):
        name = f"own-{name}"
    register_metric(MetricSpec(name, _by_pieces(metric)))
    return name


def with_named_metric(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which a metric that is a function has its name.

    Args:
        options: Options of a search by name.
    """
    named = {"metric": metric_name(options["metric"])} if callable(options.get("metric")) else {}
    return {**options, **named}


def _digest(code: CodeType) -> hashlib._Hash:
    """Of what a function computes, but for values that it takes from elsewhere."""
    digest = hashlib.sha256(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        inner = _digest(constant).digest() if isinstance(constant, CodeType) else repr(constant).encode()
        digest.update(inner)
    return digest


def _by_pieces(metric: OwnMetric) -> Callable[[Tensor, Targets], Tensor]:
    """A function of one run's logits as one of those of several: `[..., rows, vocab]` to `[..., rows]`."""
    takes_targets = _arguments(metric) > 1

    def value(logits: Tensor, targets: Targets) -> Tensor:
        more = (targets,) if takes_targets else ()
        if logits.ndim <= 2:
            return metric(logits.clone(), *more)  # others read these logits, too
        import torch

        pieces = [metric(piece.clone(), *more) for piece in logits.flatten(0, -3)]
        return torch.stack(pieces).unflatten(0, logits.shape[:-2])

    return value


def _arguments(metric: OwnMetric) -> int:
    """How many arguments a function has to be given, one or two.

    Raises:
        ConfigError: If it takes others.
    """
    try:
        signature = inspect.signature(metric)
    except (TypeError, ValueError):  # of some that are not written in Python
        return 1
    for count in (1, 2):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count
    raise ConfigError(
        f"a metric is a function of logits, or of logits and targets; got {describe(metric)} with {signature}"
    )
