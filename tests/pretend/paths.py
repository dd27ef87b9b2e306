"""Every family on every path: loads, regimes, engines and commands. As a table, with what came of them:

python -m tests.pretend.paths [--form FORM] [--long] [FAMILIES]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from typing import Any, get_args

from tests.families import ALL_FAMILIES
from tests.pretend.form import Form
from tests.pretend.process import BEST, rehearsed

Path = dict[str, Any]
FULL: Path = {"config": {"regime": "fp32"}, "dtype": "float32"}
LOW: Path = {"config": {"regime": "pahq", "compute": "bf16"}, "dtype": "bfloat16"}
RTN: Path = {"config": {"regime": "rtn"}, "dtype": "bfloat16"}
LITERAL: Path = {"config": {"regime": "pahq-literal"}, "dtype": "bfloat16"}
FP8: Path = {"config": {"regime": "pahq", "compute": "fp8"}, "dtype": "bfloat16"}
# Below the logits reader, of which nothing is cut then: whatever the threshold, they are live.
SOME: Path = {"search": {"readers": "m1,a1.h0<q>"}}
DEEP: Path = {"search": {"readers": "m0,a0.*0<?>"}}  # what they change passes through all of a layer
HOOKS: Path = {"engine": {"engine": "hooks"}}
# Readers of one head, whose slopes come back through attention and the MLP, all of whose edges stay; at this
# threshold some of their edges are estimated in every family, and in many some are tested.
VERIFIED: Path = {"search": {"readers": "a1.*0<?>", "tests": "verified", "threshold": 0.6}}

# A path by name: every regime, load, engine and command at least once; `direct` is streamed in low precision.
PATHS: dict[str, Path] = {
    "discover, fp32": FULL,
    "discover, fp32, .to": FULL | SOME | {"load": "to"},
    "discover, fp32, hooks": FULL | SOME | HOOKS,
    "discover, fp32, verified": FULL | VERIFIED,
    "discover, fp32, verified, hooks": FULL | VERIFIED | HOOKS,
    "attribute, fp32": FULL | {"command": "attribute"},
    "generate, fp32": FULL | {"command": "generate"},
    "discover, pahq, streamed": LOW,
    "discover, pahq, .to": LOW | SOME | {"load": "to"},
    "discover, pahq, device_map 0": LOW | SOME | {"load": "zero"},
    "discover, pahq, device_map auto": LOW | DEEP | {"load": "auto"},
    "discover, pahq, hooks": LOW | SOME | HOOKS,
    "discover, pahq, verified": LOW | VERIFIED,
    "discover, pahq, verified, hooks": LOW | VERIFIED | HOOKS,
    "discover, pahq, screen": LOW | {"search": {"readers": "m1", "screen": "eap-ig:0.5"}},
    "budget, pahq": LOW | SOME | {"command": "budget"},
    "discover, pahq, both directions": LOW | SOME | {"command": "both"},
    "sweep, pahq": LOW | SOME | {"command": "sweep"},
    "attribute, pahq": LOW | {"command": "attribute"},
    "evaluate, pahq": LOW | {"command": "evaluate", "n": 2},
    "evaluate, pahq, audit": LOW | VERIFIED | {"command": "audit"},
    "apply, pahq": LOW | {"command": "apply"},
    "discover, pahq, products in FP8": FP8 | DEEP,
    "discover, rtn": RTN | DEEP,
    "discover, rtn, hooks": RTN | SOME | HOOKS,
    "discover, rtn, verified": RTN | VERIFIED,
    "discover, pahq-literal": LITERAL | DEEP,
    "discover, pahq-literal, hooks": LITERAL | SOME | HOOKS,
    "discover, pahq-literal, verified": LITERAL | VERIFIED,
}
# Searches of minutes on a pretended device; in some families only.
LONG: dict[str, Path] = {
    "refine, fp32": FULL | {"command": "refine"},
    "refine, pahq": LOW | {"command": "refine"},
    "edge-pruning, fp32": FULL | {"command": "masks", "method": "edge-pruning"},
    "ugs, pahq": LOW | {"command": "masks", "method": "ugs"},
    "discover, pahq, nodes": LOW | {"search": {"level": "node", "threshold": 0.5}},
}
# How far numbers may be off, of the largest: sums come in another order, which moves what is rounded then.
# The CPU has no products in FP8, and computes those in BF16.
LIMITS = {"fp8": 0.1, "bf16": 4e-3, None: 1e-4}
# A card adds BF16 up in another order wherever the model computes in it: in all of `rtn` and `pahq-literal`.
ON_A_CARD = {"fp32": 1e-4, "pahq": 0.06, "rtn": 0.06, "pahq-literal": 0.06}
# Experts are anchored as one, without products of differences, and heads of 8 are no multiple of FP8's 16.
WITHOUT_FP8 = ("mixtral", "qwen2_moe")
COLUMNS = {
    "fp32": FULL,
    "`pahq`": LOW,
    "`pahq`, products in FP8": FP8,
    "`rtn`": RTN,
    "`pahq-literal`": LITERAL,
}
PACKAGES = ("torch", "torchao", "transformers", "accelerate", "numpy")


def of_family(family: str) -> dict[str, dict[str, Any]]:
    """The scenarios of a family by path."""
    return {name: {"model": family, **path} for name, path in PATHS.items()}


def fault(outcome: dict[str, Any], form: Form = BEST) -> str:
    """What is wrong with an outcome of a form; empty if it ran on the device and gave the CPU's answer."""
    config = outcome["scenario"]["config"]
    compute = config.get("compute")
    if outcome["failed"]:
        return str(outcome["failed"].strip().splitlines()[-1])
    if not outcome["device"].endswith(":0") or not outcome["launches"]:
        return f"ran on {outcome['device']}"
    if not outcome["same"] and compute != "fp8":
        return "other edges or tokens than on the CPU"
    if outcome["facts"].get("untested"):
        return f"never tested {', '.join(outcome['facts']['untested'])}"
    if outcome["facts"].get("estimated") == 0:
        return "nothing was estimated"
    in_fp8 = compute == "fp8" and outcome["scenario"]["model"] not in WITHOUT_FP8
    if in_fp8 != bool(outcome["products_in_fp8"]):
        return "no product was in FP8" if in_fp8 else "products were in FP8"
    share = LIMITS[compute] if form != "card" else max(ON_A_CARD[config["regime"]], LIMITS[compute])
    limit = share * outcome["scale"] + 1e-6
    return "" if outcome["error"] <= limit else f"off by {outcome['error']:.2g} of {outcome['scale']:.2g}"


def row(family: str, outcomes: Mapping[str, dict[str, Any]], wrong: Mapping[str, str]) -> str:
    """A line of the table."""
    cells = [family, f"{len(outcomes) - len(wrong)} of {len(outcomes)}"]
    for column in COLUMNS.values():
        own = [found for found in outcomes.values() if found["scenario"]["config"] == column["config"]]
        errors = [found["error"] / max(found["scale"], 1e-6) for found in own]
        others = "" if all(found["same"] for found in own) else ", other edges"
        cells.append(f"{max(errors):.1e}{others}" if own else "")
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table; returns how many paths failed.

    A row says how many paths gave the CPU's edges and tokens, and by how much, at most, numbers were off in a
    regime, of the largest.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.pretend.paths", description=main.__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=list(ALL_FAMILIES))
    parser.add_argument("--form", choices=get_args(Form), default=BEST, help=f"card: a real one ({BEST})")
    parser.add_argument("--long", action="store_true", help="the searches of minutes instead")
    options = parser.parse_args()
    paths = LONG if options.long else PATHS
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}; device: {options.form}\n")
    print(f"| family | paths | {' | '.join(COLUMNS)} |")
    print("|" + "---|" * (2 + len(COLUMNS)), flush=True)
    faults = {}
    for family in options.families:
        outcomes = {name: rehearsed(options.form, {"model": family, **path}) for name, path in paths.items()}
        wrong = {path: text for path, own in outcomes.items() if (text := fault(own, options.form))}
        faults |= {f"{family}: {path}": text for path, text in wrong.items()}
        print(row(family, outcomes, wrong), flush=True)
    for where, text in faults.items():
        print(f"\n{where}: {text}", flush=True)
    return len(faults)


if __name__ == "__main__":
    sys.exit(min(1, main()))
