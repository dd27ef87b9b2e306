"""Which ablation a circuit was found under, and how well it answers under the others it can be run with.

Edges that a corruption leaves untouched cost nothing to remove under it and may be vital under means. So a
circuit carries its accuracy under each ablation that `PAHQModel.apply` can run it with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pahq_hf.circuit.run_record import RunRecord
from pahq_hf.circuit.verdict import ACCURACY_FROM

BY_POSITION = "position."  # prefix of means by position in means.safetensors
APPLY = "apply"  # the section of discovery.json: {"ablation": of plain `apply`, "accuracy": {name: share}}
FULL = "full"  # the full model's share among them
CORRUPTED, GIVEN = "corrupted", "given"
_POOLED = "mean over tokens"
_CARRY = {
    CORRUPTED: "what the corrupted prompts write",
    GIVEN: "the means you gave",
    "zero": "nothing",
    "mean": "the stored means of its clean prompts, by position",
    "mean-corrupted": "the stored means of its corrupted prompts, by position",
    _POOLED: "stored means over all tokens",
}


def plain_ablation(found: str | None, means: Mapping[str, Any] | None) -> str | None:
    """What stands in for removed edges in `apply` without corrupted prompts.

    The ablation the circuit was found under, if it is kept with it; else means.

    Args:
        found: The ablation it was found under.
        means: The means kept with it.

    Returns:
        Its name; None if there is nothing.
    """
    if found == "zero":
        return found
    if means is None:
        return None
    if f"{BY_POSITION}embedding" not in means:
        return _POOLED
    return "mean" if found == "mean" else "mean-corrupted"


def accuracy_under(run: RunRecord, ablation: str) -> float | None:
    """A circuit's measured accuracy under an ablation, or the full model's (`FULL`); None if unknown."""
    share = (run.apply.accuracy or {}).get(ablation)
    known = isinstance(share, (int, float)) and not isinstance(share, bool) and math.isfinite(share)
    return float(share) if known else None  # type: ignore[arg-type]


def accuracies(run: RunRecord) -> list[tuple[str, float]]:
    """What removed edges carry under other ablations than the run's own, and the circuit's accuracy so."""
    names = [name for name in _CARRY if name != run.arguments.ablation]
    shares = [(name, accuracy_under(run, name)) for name in names]
    return [(_CARRY[name], share) for name, share in shares if share is not None]


def is_poor(share: float | None, full: float | None) -> bool:
    """Whether an accuracy falls short of the full model's; unknown ones do not."""
    return share is not None and full is not None and share < ACCURACY_FROM * full


def carried_under(ablation: str | None) -> str:
    """What removed edges carry under an ablation, in words."""
    return _CARRY.get(ablation or "", "nothing known")


def works_under(run: RunRecord, ablation: str | None) -> bool:
    """Whether a circuit is known to answer well when its removed edges carry something."""
    share, full = (None if name is None else accuracy_under(run, name) for name in (ablation, FULL))
    return share is not None and full is not None and not is_poor(share, full)


def notice(run: RunRecord, ablation: str) -> str | None:
    """What is to be said when a circuit is run under an ablation.

    Args:
        run: The run that found it.
        ablation: What its removed edges carry: a name of `plain_ablation`, `CORRUPTED` or `GIVEN`.

    Returns:
        One line if it is another one than it was found under, or if its accuracy is poor; else None.
    """
    found = run.arguments.ablation
    share, full = accuracy_under(run, ablation), accuracy_under(run, FULL)
    poor = is_poor(share, full)
    if not poor and (found is None or found == ablation):
        return None
    measured = "is not known" if share is None else f"is {share:.3g}"
    if share is not None and full is not None:
        measured += f", the full model's {full:.3g}"
    text = (
        f"this circuit was found under {found or 'unknown'} ablation; its removed edges now carry "
        f"{_CARRY.get(ablation, ablation)}, and its accuracy on its task's prompts then {measured}"
    )
    own = accuracy_under(run, CORRUPTED)
    if not poor and share is not None:
        return text
    helps = found == CORRUPTED if own is None else not is_poor(own, full)
    if ablation != CORRUPTED and helps:
        text += "; give corrupted prompts (corrupted=ids), or search with ablation='mean'"
    elif ablation == CORRUPTED and found != CORRUPTED:
        text += "; leave corrupted= out to run it under its own"
    return text
