"""Decisions of a finished search taken again, by tests in FP32 (docs/verified-estimates.md).

ACDC decides an edge in a circuit that its record tells: readers visited before have the edges that they kept;
of the reader's own, those are gone that were removed before it, or that a screen passed over; readers visited
later have all of theirs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.estimates import most_wrong, percent
from pahq_hf.circuit.graph import ReaderOrder
from pahq_hf.circuit.run_record import GREEDY
from pahq_hf.config import Ablation
from pahq_hf.errors import CircuitError
from pahq_hf.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Audited:
    """What tests in FP32 say of a search's removed edges.

    Attributes:
        removed: Edges that the search removed by their scores.
        audited: Removed edges that were drawn and tested.
        estimated: Audited edges whose score is an estimate.
        wrong: Audited edges that FP32 keeps in the circuit in which they were decided.
        at_most: Upper confidence limit (one-sided, 95 %) of the share of wrong ones among all removed edges;
            their share itself where all were audited.
        regime: The search's precision, where that is known.
        edges: Of each wrong one by name, the search's `score` and the `exact` one.
    """

    removed: int
    audited: int
    estimated: int
    wrong: int
    at_most: float
    regime: str | None = None
    edges: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What there is to say of it."""
        found = f"{self.wrong:,} of {self.audited:,} audited"
        found += f" {'was' if self.wrong == 1 else 'were'} wrong"
        if self.regime not in (None, "fp32"):
            found = f"FP32 decides {self.wrong:,} of {self.audited:,} audited otherwise"
        if self.audited == self.removed:
            return f"{found}, of all there are"
        return f"{found}, at most {percent(self.at_most)} are"

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON."""
        return asdict(self)


def check_auditable(circuit: Circuit) -> None:
    """Check that a circuit tells in which circuits its edges were decided.

    Raises:
        CircuitError: If it does not.
    """
    run = circuit.record
    method, order = run.method or GREEDY, run.arguments.order or "acdc"
    if method != GREEDY:
        raise CircuitError(
            f"an audit takes ACDC's decisions again: this circuit was found by {method[:80]!r}, which "
            "decides otherwise"
        )
    if run.arguments.direction != "noising":
        raise CircuitError(
            "an audit takes ACDC's decisions again as noising takes them: this circuit was found by "
            f"direction {run.arguments.direction}"
        )
    if run.arguments.more.get("prune_dead") is True:
        raise CircuitError(
            "an audit takes ACDC's decisions again: of this circuit dead edges that it kept were dropped "
            "afterwards (prune_dead)"
        )
    if run.arguments.threshold is None or run.arguments.metric is None:
        raise CircuitError(
            "an audit takes ACDC's decisions again: this circuit does not say by which threshold and metric "
            "they were taken, it was imported or made by hand"
        )
    if order not in get_args(ReaderOrder):
        raise CircuitError(f"an audit needs the order of the readers: {order[:80]!r} is none")
    if not (circuit.tested & ~circuit.kept).any():
        raise CircuitError("an audit tests removed edges again: this circuit has none that was tested")


def audit(evaluator: Evaluator, circuit: Circuit, count: int, seed: int = 0) -> Audited:
    """Test removed edges again, drawn at random, each in the circuit in which it was decided, in FP32.

    Args:
        evaluator: Of the circuit's model on the prompts of its search.
        circuit: A circuit that ACDC found, by whatever version, precision and `tests`.
        count: How many; all if there are fewer.
        seed: Of the draw.

    Returns:
        What they say.

    Raises:
        CircuitError: If the circuit does not tell how its edges were decided, or was found on other prompts.
    """
    check_auditable(circuit)
    _check_prompts(evaluator, circuit)
    run, graph = circuit.record, circuit.graph
    asked = run.arguments
    removed = np.argwhere(circuit.tested & ~circuit.kept)
    picked = np.random.default_rng(seed).choice(len(removed), min(count, len(removed)), replace=False)
    drawn: dict[int, list[int]] = {}
    for reader, writer in removed[np.sort(picked)].tolist():
        drawn.setdefault(reader, []).append(writer)
    exact = _scores(evaluator, circuit, drawn)
    threshold, absolute = cast("float", asked.threshold), asked.criterion == "absolute"
    wrong = {edge: score for edge, score in exact.items() if (abs(score) if absolute else score) >= threshold}
    everything = len(picked) == len(removed)
    share = len(wrong) / len(removed) if everything else most_wrong(len(picked), len(wrong))
    return Audited(
        removed=len(removed),
        audited=len(picked),
        estimated=sum(circuit.scored.is_estimate(*edge) for edge in exact),
        wrong=len(wrong),
        at_most=share,
        regime=run.precision.regime,
        edges={
            graph.edge_name(*edge): {"score": float(circuit.scores[edge]), "exact": score}
            for edge, score in wrong.items()
        },
    )


def _check_prompts(evaluator: Evaluator, circuit: Circuit) -> None:
    """Check that prompts are those of a search; what earlier versions do not tell is taken as it is.

    Raises:
        CircuitError: If they are others.
    """
    run = circuit.record
    found = run.header.get("task")
    if found is not None and found != evaluator.prompts:
        source = {key: value for key, value in run.task.to_json().items() if key in ("name", "n", "seed")}
        told = ", ".join(f"{key} {str(value)[:80]}" for key, value in source.items())
        raise CircuitError(
            "an audit takes decisions again on the prompts of the search, and these are others: give the "
            f"task, --n, --seed and options of the search ({told})"
        )


def _scores(
    evaluator: Evaluator, circuit: Circuit, drawn: dict[int, list[int]]
) -> dict[tuple[int, int], float]:
    """The scores of edges in FP32, in the circuits in which they were decided.

    Args:
        evaluator: Measures circuits.
        circuit: The circuit that was found.
        drawn: Writers of edges by reader.
    """
    graph, asked = circuit.graph, circuit.record.arguments
    found: dict[tuple[int, int], float] = {}
    engine = evaluator.tester(cast("str", asked.metric), cast("Ablation", asked.ablation or "corrupted"))
    try:
        full, by_gap = engine.begin(graph.all_edges), asked.criterion == "gap"
        for reader in graph.reader_order(cast("ReaderOrder", asked.order or "acdc")):
            gone = _removed_in_order(circuit, reader)
            if reader in drawn:
                engine.focus(reader)
                places = sorted(gone.index(writer) for writer in drawn[reader])
                candidates = [gone[:end] for place in places for end in (place, place + 1)]
                values = np.array(engine.try_(reader, candidates).values)
                values = np.abs(values - full) if by_gap else values
                for place, score in zip(places, values[1::2] - values[::2], strict=True):
                    found[reader, gone[place]] = float(score)
            if gone:
                engine.cut(reader, gone)
            if len(found) == sum(map(len, drawn.values())):
                break
    finally:
        engine.finish()
    return found


def _removed_in_order(circuit: Circuit, reader: int) -> list[int]:
    """Writers of a reader's removed edges as they went: untested ones first."""
    removed: NDArray[np.bool_] = ~circuit.kept[reader]
    edges = [writer for writer in circuit.graph.in_edges(reader) if removed[writer]]
    return sorted(edges, key=lambda writer: bool(circuit.tested[reader, writer]))
