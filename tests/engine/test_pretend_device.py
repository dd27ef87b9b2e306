"""Every path of the product on a pretended GPU: it runs, and finds what the CPU finds."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families import ALL_FAMILIES
from tests.pretend.form import can_compile
from tests.pretend.paths import LONG, PATHS, fault, of_family
from tests.pretend.process import BEST, rehearsed
from tests.tiers import exhaustive, quick

Scenario = dict[str, Any]
FULL: Scenario = {"regime": "fp32"}
LOW: Scenario = {"regime": "pahq", "compute": "bf16"}
FP8: Scenario = {"regime": "pahq", "compute": "fp8"}
RTN: Scenario = {"regime": "rtn"}
FEW: Scenario = {"readers": "logits,a2.h0<v>"}  # few readers: the pretended device is slow
ESTIMATES: Scenario = {"tests": "verified"}
HOOKS: Scenario = {"engine": "hooks", "batch": 1}

LOADS: dict[str, Scenario] = {
    f"{load}, {name}": {"load": load, "config": config, "search": FEW}
    for load in ("direct", "zero", "auto", "to", "wrap")
    for name, config in (("fp32", FULL), ("pahq", LOW))
}
REGIMES: dict[str, Scenario] = {
    "rtn": {"config": RTN},
    "pahq-literal": {"config": {"regime": "pahq-literal"}},
    "compute auto": {"config": {"regime": "pahq"}},
    "compute fp32": {"config": LOW | {"compute": "fp32"}},
    "compute fp8": {"config": FP8},
    "active both": {"config": LOW | {"active": "both"}},
    "tables": {"config": LOW | {"quantize_embeddings": True}},
    "policy": {"config": FP8 | {"policy": {"m*": "bf16", "a1.*": "int8"}}},
    "split groups": {"config": FULL | {"split_kv_groups": True}},
    **{f"format {fmt}": {"config": LOW | {"format": fmt}} for fmt in ("fp8-e5m2", "int8", "bf16", "mx")},
}
SEARCHES: dict[str, Scenario] = {
    **{
        f"ablation {name}": {"search": FEW | {"ablation": name}}
        for name in ("zero", "mean", "mean-corrupted")
    },
    **{f"metric {name}": {"search": FEW | {"metric": name}} for name in ("logit_diff", "nll", "prob_diff")},
    "screen": {"search": FEW | {"screen": "eap-ig:0.5"}, "config": LOW},
    "margin inf": {"search": FEW | {"margin": "inf"}, "config": LOW},
    "verified, fp32": {"search": FEW | ESTIMATES},
    "verified, pahq": {"search": FEW | ESTIMATES, "config": LOW},
    "tight budget": {"engine": {"memory_budget": 400_000}, "config": LOW},
}
ENGINES: dict[str, Scenario] = {
    "hooks, fp32": {"config": FULL, "engine": HOOKS, "search": {"readers": "logits"}},
    "hooks, pahq": {"config": LOW, "engine": HOOKS, "search": {"readers": "m2"}},
    "hooks, fp8": {"config": FP8, "engine": HOOKS, "search": {"readers": "a1.h0<v>"}},
    "hooks, verified": {
        "config": FULL,
        "engine": HOOKS,
        "search": ESTIMATES | {"readers": "a2.h0<v>"},
    },
    "hooks, pahq-literal": {
        "config": {"regime": "pahq-literal"},
        "engine": HOOKS,
        "search": {"readers": "a2.h0<q>"},
    },
}
COMMANDS: dict[str, Scenario] = {
    "evaluate": {"command": "evaluate", "config": LOW, "n": 2},
    "apply": {"command": "apply", "config": LOW},
    "generate": {"command": "generate", "config": LOW},
    "eap-ig": {"command": "attribute", "config": LOW, "method": "eap-ig"},
    "eap": {"command": "attribute", "config": FULL, "method": "eap"},
    "hisp": {"command": "attribute", "config": FULL, "method": "hisp"},
    "eap-ig-activations": {"command": "attribute", "config": LOW, "method": "eap-ig-activations"},
    "gim": {"command": "attribute", "config": LOW, "method": "gim"},
    "gim, gemma2": {"model": "gemma2", "command": "attribute", "config": FULL, "method": "gim"},
    "sweep": {"command": "sweep", "config": LOW, "search": {"readers": "logits,m2"}},
    "command line, fp32": {"command": "cli", "config": FULL, "search": {"readers": "logits"}},
    "command line, pahq": {"command": "cli", "config": {}, "search": {"readers": "logits,m2"}},
    "command line, verified": {"command": "cli", "config": {}, "search": FEW | ESTIMATES},
}
# What an MLP adds is not what its last projection gives: it is normalised or multiplied.
OUTPUTS: dict[str, Scenario] = {
    f"{family}, {name}": {
        "model": family,
        "dtype": "bfloat16",
        "config": config,
        "search": {"readers": "m1,a1.h0<q>"},
    }
    for family in ("olmo2", "gemma2", "granite")
    for name, config in (("pahq", LOW), ("compute fp32", LOW | {"compute": "fp32"}))
}
ALL = {
    name: {"config": FULL, "search": FEW, "n": 2, **scenario}
    for name, scenario in {**LOADS, **REGIMES, **SEARCHES, **ENGINES, **COMMANDS, **OUTPUTS}.items()
}
# Of every kind of path at least one; the others are crossings of these.
_QUICK = (
    *("direct, pahq", "to, pahq", "wrap, fp32"),
    *("verified, pahq", "hooks, pahq", "apply", "eap-ig", "command line, pahq"),
)
# In the form that needs no compiler, wherever the other one runs: enough to keep it working.
PURE = ("direct, fp32", "direct, pahq", "to, pahq", "apply")


def check(outcome: dict[str, Any], *, relative: float = 1e-3) -> None:
    """It ran, on the device, and gave the CPU's answer."""
    assert not outcome["failed"], outcome["failed"]
    assert outcome["device"].endswith(":0") and outcome["launches"] > 0
    assert outcome["same"] and not outcome["facts"].get("untested")
    assert outcome["facts"].get("estimated") != 0
    assert outcome["error"] <= relative * outcome["scale"] + 1e-6


@pytest.mark.parametrize("name", quick(ALL, *_QUICK))
def test_on_the_device_it_is_as_on_the_cpu(name: str) -> None:
    outcome = rehearsed(BEST, ALL[name])
    rounded = ALL[name]["config"].get("compute") == "fp8"
    check(outcome, relative=0.25 if rounded else 1e-3)
    if outcome["facts"].get("hardware") and BEST == "cuda":
        assert outcome["facts"]["hardware"]["card"] == "Pretend"
        assert outcome["facts"]["peak_memory"]["device"] > 0


@pytest.mark.skipif(not can_compile(), reason="this form runs everything where there is no compiler")
@pytest.mark.parametrize("name", quick(PURE, "direct, pahq"))
def test_without_a_compiler(name: str) -> None:
    check(rehearsed("pure", ALL[name]))


_EVERY = [(family, path) for family in ALL_FAMILIES for path in PATHS]
_FEW = [("gpt2", "discover, pahq, verified"), ("llama", "discover, fp32, verified")]


@pytest.mark.parametrize(("family", "path"), [pair if pair in _FEW else exhaustive(*pair) for pair in _EVERY])
def test_every_family_on_every_path(family: str, path: str) -> None:
    assert fault(rehearsed(BEST, of_family(family)[path])) == ""


@pytest.mark.parametrize(("family", "path"), [exhaustive("llama", path) for path in LONG])
def test_long_searches(family: str, path: str) -> None:
    """Gradients at circuits, exact effects of removals and additions."""
    assert fault(rehearsed(BEST, {"model": family, **LONG[path]})) == ""
