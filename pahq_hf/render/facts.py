"""What ran and what came out, as names and values."""

from __future__ import annotations

from typing import Any

from pahq_hf.ablation import accuracy_under, found_under, plain_ablation
from pahq_hf.circuit import Circuit
from pahq_hf.confirmation import Confirmation
from pahq_hf.verdict import Verdict


def run_facts(circuit: Circuit) -> dict[str, Any]:
    """The facts of a run that are known.

    Args:
        circuit: The circuit.

    Returns:
        Values by name, in the order they are read.
    """
    run = circuit.discovery
    edges, metric = run.get("edges", {}), run.get("metric", {})
    arguments, precision = run.get("arguments", {}), run.get("precision", {})
    facts: dict[str, Any] = {
        "model": circuit.model.get("base_model", "unknown"),
        "task": run.get("task", {}).get("name", "unknown"),
        "method": run.get("method"),
        "threshold": arguments.get("threshold"),
        "best edges": arguments.get("topn"),
        "screen": arguments.get("screen"),
        "ablation": found_under(circuit),
        "precision": precision.get("regime"),
        "edges kept": f"{circuit.edge_count:,} of {circuit.graph.edge_count:,}",
        "searched": None if circuit.verdict is None else circuit.verdict.part,
        "edges live": int(circuit.live.sum()),
        "edges tested": edges.get("tested"),
        "metric": metric.get("name"),
        "full model": metric.get("full"),
        "no edges": metric.get("empty"),
        "circuit": metric.get("final"),
        "circuit in FP32": metric.get("fp32"),
        "verified": _verified(circuit.confirmation),
        **_verdict_facts(circuit.verdict),
        "in apply()": _plain(circuit),
        "seconds": run.get("seconds", {}).get("total"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _verified(found: Confirmation | None) -> str | None:
    """Whether the hooks engine confirmed the search's value; what it found instead if not."""
    if found is None:
        return None
    return "yes" if found.verified else f"NO: {found.text}"


def _plain(circuit: Circuit) -> str | None:
    """How well the circuit answers in `apply` without corrupted prompts, if that was measured."""
    plain = plain_ablation(found_under(circuit), circuit.means)
    share = None if plain is None else accuracy_under(circuit, plain)
    return None if share is None else f"accuracy {share:.4g} ({plain})"


def _verdict_facts(verdict: Verdict | None) -> dict[str, Any]:
    if verdict is None:
        return {}
    return {
        "edges dead": verdict.dead,
        "faithfulness": verdict.faithfulness,
        verdict.accuracy_name: f"{verdict.accuracy:.4g} (full model {verdict.accuracy_full:.4g})",
        "verdict": verdict.headline,
    }
