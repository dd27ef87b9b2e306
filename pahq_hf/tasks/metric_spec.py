"""What a metric is, and what can be registered as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal, get_args

from pahq_hf.errors import ConfigError, describe
from pahq_hf.tasks.targets import FinalStream, Targets

if TYPE_CHECKING:  # torch takes seconds to import, and names are checked without it
    from torch import Tensor

Need = Literal["answers", "distractors", "reference"]


@dataclass(frozen=True)
class MetricSpec:
    """A metric: what is minimised.

    Attributes:
        name: Its name, in lower case.
        value: Row by row from logits in float64: `[..., rows, vocab]` and targets to `[..., rows]`.
        from_stream: The same from final streams, where it needs less than all logits; the sparse engine makes
            logits for a metric without.
        needs: What it takes of a task's rows (`answers`, `distractors`); `reference` are the full model's
            logits.
        differentiable: Whether `value` has a gradient, which attribution follows.
        flat_at_full: Whether that is zero at the full model, as of a distance to it.
        rounding: How far a value moves at most when no logit moves by more than an error, from both; by
            default the error times the gradient, summed up.
        tasks: Generated tasks that are usually scored with it.
    """

    name: str
    value: Callable[[Tensor, Targets], Tensor]
    from_stream: Callable[[FinalStream, Targets], Tensor] | None = None
    needs: tuple[Need, ...] = ()
    differentiable: bool = True
    flat_at_full: bool = False
    rounding: Callable[[float, float], float] | None = None
    tasks: tuple[str, ...] = ()


def check_spec(spec: MetricSpec) -> None:
    """Check the fields of a metric that somebody registers.

    Raises:
        ConfigError: If one is of another type, or it needs what no task has.
    """
    if not callable(spec.value):
        raise ConfigError(f"metric {spec.name!r} needs a function of logits and targets as its value")
    for name in ("from_stream", "rounding"):
        given = getattr(spec, name)
        if given is not None and not callable(given):
            raise ConfigError(
                f"metric {spec.name!r} needs a function or None as {name}; got {describe(given)}"
            )
    for name in ("differentiable", "flat_at_full"):
        if not isinstance(getattr(spec, name), bool):
            raise ConfigError(f"metric {spec.name!r}: {name} is True or False; got {getattr(spec, name)!r}")
    for name in ("needs", "tasks"):
        given = getattr(spec, name)
        if not isinstance(given, tuple) or not all(isinstance(each, str) for each in given):
            raise ConfigError(f"metric {spec.name!r}: {name} is a tuple of names; got {describe(given)}")
    for need in spec.needs:
        if need not in get_args(Need):
            close = get_close_matches(need, get_args(Need), n=1)
            raise ConfigError(
                f"metric {spec.name!r} cannot need {need!r}: "
                + (f"did you mean {close[0]!r}?" if close else f"it can need {', '.join(get_args(Need))}")
            )
