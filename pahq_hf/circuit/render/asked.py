"""What a search was asked for, and what it says of itself, as names and values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pahq_hf.circuit.estimates import EstimateFacts
from pahq_hf.circuit.files import DIRECTION_NAMES
from pahq_hf.circuit.run_record import RunRecord

_MASKS = ("edge-pruning", "ugs")  # methods that learn masks
# Methods of which `steps` says something, and of which `seed` does.
_STEPS = ("eap-ig", "eap-ig-activations", "ensemble", "refine", *_MASKS)
_SEED = ("random", "refine", *_MASKS)
_LEARNED = ("rate", "minibatch", "samples", "penalty")  # of masks, beside these
_NAMES = re.compile(r"[a-z, -]{1,200}")


def asked_facts(run: RunRecord) -> dict[str, Any]:
    """What a search was asked for; None where it was not.

    Args:
        run: What ran.
    """
    asked = run.arguments
    units = f"{asked.level}s"
    facts: dict[str, Any] = {
        "level": "node" if asked.level == "node" else None,
        "threshold": _number(asked.threshold if asked.threshold is not None else asked.more.get("threshold")),
        f"best {units}": asked.topn,
        f"most {units}": _number(asked.more.get("edges")),
        "max gap": _number(asked.more.get("max_gap")),
    }
    if run.method in _STEPS:
        facts["steps"] = _number(asked.more.get("steps"))
    if run.method in _SEED:
        facts["seed"] = _number(asked.more.get("seed"))
    for name in _LEARNED if run.method in _MASKS else ():
        facts[name] = _number(asked.more.get(name))
    members = asked.more.get("members")
    if run.method == "ensemble" and isinstance(members, str) and _NAMES.fullmatch(members):
        facts["mean of"] = members
    return facts


def own_facts(run: RunRecord) -> dict[str, Any]:
    """What searches say of themselves, as far as it is known.

    Of a search in both directions it is what each of them says, and how sure each is of its estimates.

    Args:
        run: What ran.
    """
    units = f"{run.arguments.level}s"
    facts = _own(run.method, run.more, units)
    for name in DIRECTION_NAMES:
        part = run.directions.get(name)
        if isinstance(part, Mapping):
            told = _own(run.method, part, units) | _estimates(part.get("estimates"))
            facts |= {f"{name}: {fact}": value for fact, value in told.items()}
    return facts


def _own(method: str | None, said: Mapping[str, Any], units: str) -> dict[str, Any]:
    budget, refine, masks = said.get("budget"), said.get("refine"), said.get("masks")
    facts: dict[str, Any] = {}
    if method == "budget" and isinstance(budget, Mapping):
        facts["largest gap allowed"] = _number(budget.get("bound"))
        facts["kept by the budget alone"] = _number(budget.get("kept_below_tau"))
    if method == "refine" and isinstance(refine, Mapping):
        facts |= _on_pairs(refine)
        taken, rounds = _number(refine.get("taken")), _number(refine.get("rounds"))
        if "locally_minimal" in refine and rounds is not None:
            facts["round taken"] = f"{f'none: no {units} are nearer' if taken is None else taken} of {rounds}"
            facts["locally minimal"] = "yes" if refine["locally_minimal"] is True else "not known"
    if method in _MASKS and isinstance(masks, Mapping):
        facts |= _on_pairs(masks)
        taken, stretches = _number(masks.get("taken")), _number(masks.get("stretches"))
        facts["stretch taken"] = None if None in (taken, stretches) else f"{taken} of {stretches}"
        facts["masks"] = (
            "did not part: which edges are kept is mostly chance; raise --steps"
            if masks.get("parted") is False
            else None
        )
        expected = _number(masks.get("expected_edges"))
        facts["edges of a mask on average"] = (
            f"{expected:.4g}" if isinstance(expected, (int, float)) else None
        )
    return facts


def _on_pairs(said: Mapping[str, Any]) -> dict[str, Any]:
    """How faithful a circuit is on either kind of pairs."""
    return {
        "faithful on searched pairs": _faithful(said.get("searched")),
        "on pairs that judged": _faithful(said.get("validation")),
    }


def _estimates(said: object) -> dict[str, Any]:
    facts = EstimateFacts.from_json(said) if isinstance(said, Mapping) else EstimateFacts()
    if facts.text is None:
        return {}
    return {"tested by": facts.shares, "decisions like ACDC's": facts.text}


def _faithful(facts: object) -> str | None:
    if not isinstance(facts, Mapping):
        return None
    value, pairs = _number(facts.get("faithfulness")), _number(facts.get("examples"))
    share = f"{value:.4g}" if isinstance(value, (int, float)) else "undefined"
    return None if pairs is None else f"{share} ({pairs} pair{'' if pairs == 1 else 's'})"


def _number(value: object) -> int | float | str | None:
    """A number of a file, `inf` in words; None where it is something else."""
    if value == "inf":
        return "inf"
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
