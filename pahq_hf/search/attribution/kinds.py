"""Which attribution methods there are, and what each needs of a metric: the one table of them.

What a method does is a function of `scoring`, under the same name; neither this file nor what it imports
loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pahq_hf.circuit.run_record import TITLES
from pahq_hf.errors import ConfigError, MetricError
from pahq_hf.tasks.metrics import find_metric

MethodName = Literal[
    "eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "gim", "hisp", "exact", "random", "ensemble"
]


@dataclass(frozen=True)
class MethodKind:
    """What there is to know of a method before it runs.

    Attributes:
        title: What it is, in words, for model cards.
        gradient: Where it takes the metric's gradient: nowhere, at the clean run only, or elsewhere too.
        takes: Options that it has and others have not (`OWN`).
        has_engine: Whether it measures circuits by an engine.
        adds_up: Whether scores of a node's edges out add up to the node's. Else the edge into `logits` has
            the node's score.
    """

    title: str
    gradient: Literal["nowhere", "clean", "elsewhere"] = "elsewhere"
    takes: frozenset[str] = frozenset()
    has_engine: bool = False
    adds_up: bool = True


_STEPS, _SEED = frozenset({"steps"}), frozenset({"seed"})
OWN = ("steps", "seed", "members")  # options of some methods; all others are of all

METHODS: Mapping[MethodName, MethodKind] = {
    "eap": MethodKind(TITLES["eap"], "clean"),
    "eap-ig": MethodKind(TITLES["eap-ig"], takes=_STEPS),
    "eap-ig-activations": MethodKind(
        "EAP with gradients integrated over activations (EAP-IG-activations)", takes=_STEPS
    ),
    "clean-corrupted": MethodKind("edge attribution patching at the clean and the corrupted run"),
    "gim": MethodKind("EAP with gradient interaction modifications (GIM)", "clean"),
    "hisp": MethodKind(TITLES["hisp"], "clean", adds_up=False),
    "exact": MethodKind(TITLES["exact"], "nowhere", has_engine=True),
    "random": MethodKind(TITLES["random"], "nowhere", _SEED),
    # What its members are decides the rest.
    "ensemble": MethodKind("mean of the scores of several methods", "nowhere", frozenset(OWN)),
}

MEMBERS = (
    "eap-ig,eap-ig-activations,clean-corrupted"  # that `ensemble` has by default: any metric allows them
)


def parse_members(text: str) -> tuple[MethodName, ...]:
    """The methods of an ensemble.

    Args:
        text: Their names, with commas between them.

    Raises:
        ConfigError: If they are not two or more different ones.
    """
    given: object = text
    names = [name.strip() for name in text.split(",")] if isinstance(given, str) else []
    found = tuple(name for name in METHODS if name in names and name != "ensemble")
    if len(found) != len(names) or len(found) < 2:
        known = ", ".join(name for name in METHODS if name != "ensemble")
        raise ConfigError(
            f"members must be two or more different methods with commas between them, such as {MEMBERS}, of "
            f"{known}; got {text!r}"
        )
    return found


def methods_of(method: MethodName, members: str) -> tuple[MethodName, ...]:
    """The methods whose scores one is made of: itself, or the members of an ensemble."""
    return parse_members(members) if method == "ensemble" else (method,)


def check_own(method: MethodName, members: str, given: Mapping[str, object]) -> None:
    """Check that a method, or a member of an ensemble, has a use for options that not all have.

    Args:
        method: Its name.
        members: Methods of an ensemble.
        given: Options of `OWN` that somebody gave.

    Raises:
        ConfigError: Naming the first that it has no use for, and whose it is.
    """
    taken = set(METHODS[method].takes - {"steps", "seed"} if method == "ensemble" else ())
    taken = taken.union(*(METHODS[each].takes for each in methods_of(method, members)))
    for name in given:
        if name not in taken:
            verb = "is" if name == "seed" else "are"
            others = " and ".join(each for each, kind in METHODS.items() if name in kind.takes)
            told = f"the members are {members}" if method == "ensemble" else f"the method is {method}"
            raise ConfigError(f"{name} {verb} of method {others}; {told}")


def check_gradient(method: MethodName, metric: str) -> None:
    """Check that a method means anything for a metric.

    Args:
        method: Name of the method.
        metric: Name of the metric.

    Raises:
        MetricError: If there is no such metric, or the method takes a gradient that it does not have, or that
            is zero at the clean run.
    """
    spec, gradient = find_metric(metric), METHODS[method].gradient
    if gradient != "nowhere" and not spec.differentiable:
        raise MetricError(
            f"{method} cannot use {metric}, which has no gradient; use exact, or a metric such as logit_diff"
        )
    if gradient == "clean" and spec.flat_at_full:
        raise MetricError(
            f"{method} cannot use {metric}: its gradient at the clean run is zero, and so would be every "
            "score; use eap-ig, or a metric such as logit_diff"
        )
