"""Which attribution methods there are, and what each needs of a metric: the one table of them.

What a method does is a function of `scoring`, under the same name; neither this file nor what it imports
loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pahq_hf.circuit.run_record import TITLES

MethodName = Literal[
    "eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "gim", "hisp", "exact", "random"
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
}
