"""What is rehearsed, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """What is run.

    Attributes:
        model: `demo`, or a family of the tests.
        dtype: Of the family's checkpoint.
        load: How the model gets to the device: `direct`, `to`, `zero` (`device_map={"": 0}`), `auto`, `wrap`
            (transformers' own model, moved and then wrapped).
        command: What is run: `discover`, `refine`, `masks` (learned ones), `budget`, `both` (a search in both
            directions), `sweep`, `attribute`, `evaluate`, `audit`, `apply`, `generate`, `cli`, or `shortage`,
            an engine's work with less memory than it takes.
        config: Fields of `PAHQConfig`.
        search: Fields of `ACDCConfig`.
        engine: Fields of `EngineConfig`.
        method: Of `attribute`, or which `masks`.
        n: Prompts.
        during: Of `shortage`: in what memory is short (`shortage.WORK`).
        capacity: Of `shortage`: memory for that, in shares of what it takes without a bound.
    """

    model: str = "demo"
    dtype: str = "float32"
    load: str = "direct"
    command: str = "discover"
    config: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    method: str = "eap-ig"
    n: int = 3
    during: str = ""
    capacity: float = 1.0


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        scenario: What was run.
        failed: How it failed, if it did.
        same: Whether the edges, or tokens, are the CPU's.
        error: Largest difference of scores, or logits, from the CPU's.
        scale: Largest of the CPU's.
        kept: Edges kept.
        device: Where the model was.
        facts: Of the run's circuit: `hardware`, `peak_memory`; `untested`, readers that were to be tested;
            `estimated`, how many scores are estimates, where they may be.
        launches: Kernels.
        products_in_fp8: Those among them that multiply in FP8.
        crossings: Copies between host and device.
        sent: Bytes that were copied to the device, by dtype.
    """

    scenario: dict[str, Any]
    failed: str = ""
    same: bool = False
    error: float = float("nan")
    scale: float = 0.0
    kept: int = 0
    device: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    launches: int = 0
    products_in_fp8: int = 0
    crossings: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a command gives: edges or tokens, and numbers."""

    choice: Any
    numbers: Any
    facts: dict[str, Any] = field(default_factory=dict)
