"""Which attribution methods there are, and what each needs of a metric: the one table of them.

What a method does is a function of `scoring`, under the same name; neither this file nor what it imports
loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pahq_hf.circuit.run_record import TITLES
from pahq_hf.errors import ConfigError

MethodName = Literal[
    "eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "gim", "hisp", "exact", "random", "ensemble"
]


@dataclass(frozen=True)
class MethodKind:
    """What there is to know of a method before it runs.

    Attributes:
        title: What it is, in words, for model cards.
        gradient: Where it takes the metric's gradient: nowhere, at the clean run only, or elsewhere too.
    """

    title: str
    gradient: Literal["nowhere", "clean", "elsewhere"] = "elsewhere"


METHODS: Mapping[MethodName, MethodKind] = {
    "eap": MethodKind(TITLES["eap"], "clean"),
    "eap-ig": MethodKind(TITLES["eap-ig"]),
    "eap-ig-activations": MethodKind("EAP with gradients integrated over activations (EAP-IG-activations)"),
    "clean-corrupted": MethodKind("edge attribution patching at the clean and the corrupted run"),
    "gim": MethodKind("EAP with gradient interaction modifications (GIM)", "clean"),
    "hisp": MethodKind(TITLES["hisp"], "clean"),
    "exact": MethodKind(TITLES["exact"], "nowhere"),
    "random": MethodKind(TITLES["random"], "nowhere"),
    "ensemble": MethodKind("mean of the scores of several methods", "nowhere"),  # that is its members' affair
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
