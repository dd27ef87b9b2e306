"""Every family on every path: loads, regimes, engines and commands. As a table, with what came of them:

python -m tests.pretend.paths [FAMILIES]
"""

from __future__ import annotations

import sys
from typing import Any

from tests.families import ALL_FAMILIES
from tests.pretend.process import BEST, rehearsed

FULL: dict[str, Any] = {"config": {"regime": "fp32"}, "dtype": "float32"}
LOW: dict[str, Any] = {"config": {"regime": "pahq", "compute": "bf16"}, "dtype": "bfloat16"}
RTN: dict[str, Any] = {"config": {"regime": "rtn"}, "dtype": "bfloat16"}
LITERAL: dict[str, Any] = {"config": {"regime": "pahq-literal"}, "dtype": "bfloat16"}
FP8: dict[str, Any] = {"config": {"regime": "pahq", "compute": "fp8"}, "dtype": "bfloat16"}
# Below the logits reader, of which nothing is cut then: whatever the threshold, both are live.
SOME = {"search": {"readers": "m1,a1.h0<q>"}}
HOOKS = {"engine": {"engine": "hooks"}}

# A path by name: every regime, load, engine and command at least once; `direct` is streamed in low precision.
PATHS: dict[str, dict[str, Any]] = {
    "discover, fp32": FULL,
    "discover, pahq, streamed": LOW,
    "discover, pahq, .to": LOW | SOME | {"load": "to"},
    "discover, pahq, device_map 0": LOW | SOME | {"load": "zero"},
    "discover, pahq, device_map auto": LOW | SOME | {"load": "auto"},
    "discover, pahq, products in FP8": FP8 | SOME,
    "discover, rtn": RTN | SOME,
    "discover, pahq-literal": LITERAL | SOME,
    "discover, fp32, hooks": FULL | SOME | HOOKS,
    "discover, pahq, hooks": LOW | SOME | HOOKS,
    "screen": LOW | {"search": {"readers": "m1", "screen": "eap-ig:0.5"}},
    "sweep": LOW | SOME | {"command": "sweep"},
    "attribute, fp32": FULL | {"command": "attribute"},
    "attribute, pahq": LOW | {"command": "attribute"},
    "evaluate": LOW | {"command": "evaluate", "n": 2},
    "apply": LOW | {"command": "apply"},
    "generate": FULL | {"command": "generate"},
}
_ROUNDED = {"discover, pahq, products in FP8": 0.25}  # of the largest score


def of_family(family: str) -> dict[str, dict[str, Any]]:
    """The scenarios of a family by path."""
    return {name: {"model": family, **path} for name, path in PATHS.items()}


def fault(outcome: dict[str, Any], path: str) -> str:
    """What is wrong with an outcome; empty if it ran on the device and gave the CPU's answer."""
    if outcome["failed"]:
        return str(outcome["failed"].strip().splitlines()[-1])
    if not outcome["device"].endswith(":0") or not outcome["launches"]:
        return f"ran on {outcome['device']}"
    if not outcome["same"] and path not in _ROUNDED:
        return "other edges or tokens than on the CPU"
    if outcome["facts"].get("untested"):
        return f"never tested {', '.join(outcome['facts']['untested'])}"
    limit = _ROUNDED.get(path, 1e-3) * outcome["scale"] + 1e-6
    return "" if outcome["error"] <= limit else f"off by {outcome['error']:.2g} of {outcome['scale']:.2g}"


def main() -> int:
    """Print the table; returns how many paths failed."""
    families = sys.argv[1:] or list(ALL_FAMILIES)
    failed = 0
    for family in families:
        own = of_family(family)
        faults = {path: fault(rehearsed(BEST, own, path), path) for path in own}
        wrong = {path: text for path, text in faults.items() if text}
        failed += len(wrong)
        print(f"{family}: {len(own) - len(wrong)} of {len(own)}", flush=True)
        for path, text in wrong.items():
            print(f"  {path}: {text}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main()))
