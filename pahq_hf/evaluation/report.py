"""Everything asked about one circuit, JSON-ready."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.ablation import APPLY
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.fitting import in_one_graph
from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.config import check_number
from pahq_hf.errors import ConfigError, check_names, describe
from pahq_hf.evaluation.audit import audit
from pahq_hf.evaluation.curves import faithfulness_curve, rank_edges
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.evaluation.necessity import completeness, minimality
from pahq_hf.evaluation.roc import edge_roc, node_roc, nodes_of, precision_recall


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure besides `Evaluator.report`.

    Attributes:
        curve: Faithfulness over circuit size, CPR and CMD, by the circuit's scores.
        minimality: The drop-one effect of every kept edge.
        completeness: The complement, and Wang et al.'s criterion on `samples` random subsets.
        samples: How many.
        seed: What they are drawn from.
        reference: A known circuit of the same graph to score against: ROC, precision, recall.
        audit: So many removed edges, drawn at random, are tested again where they were decided; 0 for none.
    """

    curve: bool = False
    minimality: bool = False
    completeness: bool = False
    samples: int = 20
    seed: int = 0
    reference: Circuit | None = None
    audit: int = 0

    def __post_init__(self) -> None:
        check_number("samples", self.samples, whole=True, least=0)
        check_number("seed", self.seed, whole=True)
        check_number("audit", self.audit, whole=True, least=0)
        given: object = self.reference
        if given is not None and not isinstance(given, Circuit):
            raise ConfigError(
                f"reference takes a Circuit (Circuit.from_pretrained(...)); got {describe(given)}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvaluationOptions:
        """Read options by name.

        Raises:
            ConfigError: If one is unknown or out of range.
        """
        check_names(values, [field.name for field in fields(cls)], "evaluate")
        return cls(**values)


def evaluate(evaluator: Evaluator, circuit: Circuit, options: EvaluationOptions) -> dict[str, Any]:
    """Measure a circuit.

    Args:
        evaluator: Measures circuits of the circuit's model.
        circuit: The circuit.
        options: What to measure besides the usual.

    Returns:
        `Evaluator.report` and `apply` (`Evaluator.applied`), with `curve`, `minimality`, `completeness`,
        `audit` and `reference` as asked.

    Raises:
        CircuitError: If the circuit or the reference is of another graph, or the circuit cannot be audited.
        ConfigError: If the reference holds no edge, or all of them.
        MetricError: If a curve is asked and the metric does not tell the full model from no edges.
    """
    audited = audit(evaluator, circuit, options.audit, options.seed) if options.audit else None
    facts = evaluator.report(circuit)
    run = circuit.record
    facts[APPLY] = evaluator.applied(circuit.kept, run.arguments.ablation, circuit.means, facts["accuracy"])
    if options.curve:
        facts["curve"] = curve_facts(evaluator, circuit)
    if options.minimality:
        # tau means something in the metric it was searched with.
        tau = run.arguments.threshold if run.metric.name == facts["metric"]["name"] else None
        facts["minimality"] = minimality(evaluator, circuit.kept, tau).to_dict()
    if options.completeness:
        facts["completeness"] = completeness(evaluator, circuit.kept, options.samples, options.seed).to_dict()
    if audited is not None:
        facts["audit"] = audited.to_dict()
    if options.reference is not None:
        facts["reference"] = reference_facts(circuit, options.reference)
    return facts


def curve_facts(evaluator: Evaluator, circuit: Circuit) -> dict[str, Any]:
    """CPR by signed score, CMD by |score|, both linear and logarithmic, and both curves."""
    first = circuit.kept if circuit.record.ranks_kept_first else None
    curves = {
        name: faithfulness_curve(
            evaluator, rank_edges(circuit.graph, circuit.scores, absolute=absolute, first=first)
        )
        for name, absolute in (("signed", False), ("absolute", True))
    }
    return {
        "cpr": curves["signed"].cpr,
        "cmd": curves["absolute"].cmd,
        "cpr_log": curves["signed"].cpr_log,
        "cmd_log": curves["absolute"].cmd_log,
        "ranking": "scores" if first is None else "kept edges first, then scores",
        **{name: curve.to_dict() for name, curve in curves.items()},
    }


def reference_facts(circuit: Circuit, reference: Circuit) -> dict[str, Any]:
    """ROC by the circuit's scores, and precision and recall of what it kept.

    Args:
        circuit: The circuit.
        reference: A known circuit; its edges are matched by name.

    Returns:
        `edges` and `nodes`, each with `total`, `truth`, `precision`, `recall` and `roc`. The ROC of nodes is
        None where the reference touches all of them.

    Raises:
        CircuitError: If the reference has edges that the circuit's graph does not have.
        ConfigError: If it holds no edge, or all of them.
    """
    circuit, reference = in_one_graph(circuit, reference)
    graph = circuit.graph
    truth = edges_in(graph, reference)
    scores = ranked_scores(circuit)
    nodes, found = nodes_of(graph, truth), nodes_of(graph, circuit.kept)
    return {
        "edges": {
            "total": graph.edge_count,
            "truth": int(truth.sum()),
            **precision_recall(truth, circuit.kept),
            "roc": edge_roc(graph, truth, scores=scores).to_dict(),
        },
        "nodes": {
            "total": len(nodes),
            "truth": int(nodes.sum()),
            **precision_recall(nodes, found),
            "roc": None if nodes.all() else node_roc(graph, truth, scores=scores).to_dict(),
        },
    }


def edges_in(graph: Graph, reference: Circuit) -> BoolArray:
    """A circuit's edges in another graph, by name.

    Raises:
        CircuitError: If the graph lacks one.
    """
    kept = graph.no_edges()
    for r, w in edge_list(reference.kept):
        kept[graph.parse_edge(reference.graph.edge_name(r, w))] = True
    return kept


def ranked_scores(circuit: Circuit) -> NDArray[np.float64]:
    """The circuit's scores, or where kept edges come first numbers in that order. [readers, writers]"""
    if not circuit.record.ranks_kept_first:
        return circuit.scores
    exists = circuit.graph.all_edges
    pairs = np.stack([circuit.kept[exists].astype(np.float64), circuit.scores[exists]], axis=1)
    _, order = np.unique(pairs, axis=0, return_inverse=True)
    ranked = np.zeros(exists.shape)
    ranked[exists] = order.reshape(-1)
    return ranked
