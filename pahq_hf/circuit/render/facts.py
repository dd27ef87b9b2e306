"""What ran and what came out, as names and values."""

from __future__ import annotations

from typing import Any, Protocol

from pahq_hf.circuit.ablation import accuracy_under
from pahq_hf.circuit.confirmation import Confirmation
from pahq_hf.circuit.gates import gate_counts
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.render.asked import asked_facts, own_facts
from pahq_hf.circuit.run_record import RunRecord
from pahq_hf.circuit.scored_edges import ScoredEdges
from pahq_hf.circuit.verdict import Verdict


class Described(Protocol):
    """What a page, a card or a table shows of a circuit (`Circuit`)."""

    @property
    def scored(self) -> ScoredEdges:
        """The edges and their scores."""

    @property
    def identity(self) -> ModelIdentity:
        """What identifies the base model."""

    @property
    def record(self) -> RunRecord:
        """What ran and what came out."""

    @property
    def plain_ablation(self) -> str | None:
        """What removed edges carry in `PAHQModel.apply` without corrupted prompts."""


def run_facts(circuit: Described) -> dict[str, Any]:
    """The facts of a run that are known.

    Args:
        circuit: The circuit.

    Returns:
        Values by name, in the order they are read.
    """
    run, edges = circuit.record, circuit.scored
    asked, metric, verdict = run.arguments, run.metric, run.verdict
    facts: dict[str, Any] = {
        "model": circuit.identity.base_model or "unknown",
        "task": run.task.name or "unknown",
        "pairs": run.task.pairs,
        "method": run.method,
        **asked_facts(run),
        "direction": None if asked.direction == "noising" else asked.direction,
        "found by": gates_text(edges),
        "criterion": None if asked.criterion == "signed" else asked.criterion,
        "screen": asked.screen,
        "ablation": asked.ablation,
        "precision": run.precision.regime,
        "nodes kept": run.nodes.text,
        "nodes tested": run.nodes.tested,
        "edges kept": f"{edges.edge_count:,} of {edges.graph.edge_count:,}",
        "searched": None if verdict is None else verdict.part,
        "edges live": int(edges.live.sum()),
        "edges tested": run.edges.tested,
        "of which by": run.estimates.shares,
        "decisions like ACDC's": run.estimates.text,
        "metric": metric.name,
        "full model": metric.full,
        "no edges": metric.empty,
        "circuit": metric.final,
        "circuit in FP32": metric.fp32,
        "with prompts swapped": swapped_text(run),
        "verified": _verified(run.confirmation),
        **_verdict_facts(verdict),
        **own_facts(run),
        **run.bootstrap.texts,
        "in apply()": _plain(run, circuit.plain_ablation),
        "seconds": run.total_seconds,
    }
    return {name: value for name, value in facts.items() if value is not None}


def gates_text(edges: ScoredEdges) -> str | None:
    """How many edges, or nodes, were found by which direction; None unless a search took both."""
    found = edges.found_by if edges.scored_nodes is None else edges.scored_nodes.found_by
    if found is None:
        return None
    counts = gate_counts(found)
    return (
        f"noising alone {counts['AND']:,} (AND), denoising alone {counts['OR']:,} (OR), "
        f"both {counts['ADDER']:,} (ADDER)"
    )


def swapped_text(run: RunRecord) -> str | None:
    """What denoising found does: how far its edges alone carry the corruption; None without denoising."""
    found = run.swapped.faithfulness
    if found is None:
        return None
    return f"faithfulness {found:.3f}: corrupting these edges alone breaks so much of the behaviour"


def _verified(found: Confirmation | None) -> str | None:
    """Whether the hooks engine confirmed the search's value; what it found instead if not."""
    if found is None:
        return None
    return "yes" if found.verified else f"NO: {found.text}"


def _plain(run: RunRecord, plain: str | None) -> str | None:
    """How well the circuit answers in `apply` without corrupted prompts, if that was measured."""
    share = None if plain is None else accuracy_under(run, plain)
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
