"""ROC of a circuit or of edge scores against a known circuit (docs/semantics.md, section 6).

Conmy et al. 2023, "Towards Automated Circuit Discovery", section 4: is an edge (a node) of the reference
circuit found? True positive rate over false positive rate, as the threshold goes. The area is taken by one
of two rules:

* `step` (pessimistic, the ACDC paper's tables, `pessimistic_auc` of its code): between two measured points
  the true positive rate stays that of the left one, `sum (1 - fpr_i) (tpr_i - tpr_{i-1})`. With scores this
  is the probability that an edge of the reference outranks another one, ties counting as losses.
* `trapezoid`: points are joined by lines. With scores it is the same probability, ties counting one half
  (Mann-Whitney). A random ranking gives .5.

Every edge of the graph counts, as does every node. Nodes are the writers and `logits`; `input` and `logits`
are nodes like any other. A circuit's nodes are those its edges touch, at either end, as in ACDC's
`get_present_nodes`; a shared key/value reader touches all its heads (`Circuit.nodes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.errors import ConfigError

AucRule = Literal["step", "trapezoid"]


@dataclass(frozen=True)
class Roc:
    """Points of a ROC curve, from (0, 0) to (1, 1), both coordinates ascending.

    Attributes:
        fpr: False positive rates.
        tpr: True positive rates.
    """

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]

    def auc(self, rule: AucRule) -> float:
        """Area under the curve.

        Args:
            rule: `step` (pessimistic) or `trapezoid`.

        Returns:
            Between 0 and 1.

        Raises:
            ConfigError: If the rule is unknown.
        """
        x, y = np.array(self.fpr), np.array(self.tpr)
        if rule == "step":
            heights = y[:-1]
        elif rule == "trapezoid":
            heights = (y[1:] + y[:-1]) / 2
        else:
            raise ConfigError(f"rule must be one of {', '.join(get_args(AucRule))}, not {rule!r}")
        return float(np.clip((np.diff(x) * heights).sum(), 0.0, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """Points and both areas, for JSON."""
        auc = {rule: self.auc(rule) for rule in get_args(AucRule)}
        return {"fpr": list(self.fpr), "tpr": list(self.tpr), "auc": auc}


def edge_roc(
    graph: Graph,
    truth: BoolArray,
    *,
    scores: NDArray[np.float64] | None = None,
    circuits: Sequence[BoolArray] | None = None,
) -> Roc:
    """ROC over edges; give either scores or the circuits of a threshold sweep.

    Args:
        graph: The graph.
        truth: The reference circuit. [readers, writers]
        scores: A score per edge. Every distinct score is a threshold: edges that tie come in together,
            as one step. [readers, writers]
        circuits: Kept edges at each threshold. Each is one point; points that another one beats (fewer
            false positives and more true ones) are dropped, as in the ACDC paper, and the rest, with
            (0, 0) and (1, 1), make the curve. Each [readers, writers]

    Returns:
        The curve.

    Raises:
        ConfigError: If not exactly one of scores and circuits is given, an array has another shape than the
            graph, a score is NaN, or the reference holds no edge or all of them.
    """
    _check(graph, truth, scores, circuits)
    exists = graph.all_edges
    wanted = np.asarray(truth, dtype=bool)[exists]
    if scores is not None:
        return _from_scores(np.asarray(scores, dtype=np.float64)[exists], wanted, "edges")
    return _from_sets([np.asarray(kept, dtype=bool)[exists] for kept in circuits or ()], wanted, "edges")


def node_roc(
    graph: Graph,
    truth: BoolArray,
    *,
    scores: NDArray[np.float64] | None = None,
    circuits: Sequence[BoolArray] | None = None,
) -> Roc:
    """ROC over nodes; arguments as for `edge_roc`.

    A node's score is the largest of its edges' scores, in or out, so that its nodes at a threshold are those
    of the circuit of edges above it.

    Args:
        graph: The graph.
        truth: The reference circuit's edges. [readers, writers]
        scores: A score per edge. [readers, writers]
        circuits: Kept edges at each threshold. Each [readers, writers]

    Returns:
        The curve.

    Raises:
        ConfigError: As `edge_roc`.
    """
    _check(graph, truth, scores, circuits)
    wanted = nodes_of(graph, truth)
    if scores is not None:
        return _from_scores(node_scores(graph, scores), wanted, "nodes")
    return _from_sets([nodes_of(graph, kept) for kept in circuits or ()], wanted, "nodes")


def node_scores(graph: Graph, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest score of each node's edges, in or out.

    Args:
        graph: The graph.
        scores: A score per edge. [readers, writers]

    Returns:
        Writers, then `logits`. [writers + 1]
    """
    masked = np.where(graph.all_edges, np.asarray(scores, dtype=np.float64), -np.inf)
    best: NDArray[np.float64] = np.append(masked.max(axis=0), -np.inf)
    for reader, largest in enumerate(masked.max(axis=1)):
        nodes = list(graph.readers[reader].nodes) or [-1]  # `logits` comes last
        best[nodes] = np.maximum(best[nodes], largest)
    return best


def nodes_of(graph: Graph, kept: BoolArray) -> BoolArray:
    """Nodes that an edge set touches, at either end.

    Args:
        graph: The graph.
        kept: Edges. [readers, writers]

    Returns:
        Writers, then `logits`. [writers + 1]
    """
    return node_scores(graph, np.asarray(kept, dtype=np.float64)) > 0


def precision_recall(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> dict[str, float | None]:
    """Precision and recall of a set; None where nothing was found, or nothing was there to find.

    Args:
        truth: What belongs to the reference.
        found: What was found; same shape.

    Returns:
        `precision` and `recall`.
    """
    hits, there, seen = int((truth & found).sum()), int(truth.sum()), int(found.sum())
    return {"precision": hits / seen if seen else None, "recall": hits / there if there else None}


def _check(
    graph: Graph,
    truth: BoolArray,
    scores: NDArray[np.float64] | None,
    circuits: Sequence[BoolArray] | None,
) -> None:
    if (scores is None) == (circuits is None):
        raise ConfigError("a ROC needs either scores or the circuits of a sweep")
    for array in [truth, *([] if scores is None else [scores]), *(circuits or ())]:
        if np.shape(array) != graph.all_edges.shape:
            raise ConfigError(f"an array has shape {np.shape(array)}; the graph has {graph.all_edges.shape}")
    if scores is not None and np.isnan(np.asarray(scores)[graph.all_edges]).any():
        raise ConfigError("a score is NaN: edges cannot be ranked")


def _counts(wanted: NDArray[np.bool_], what: str) -> tuple[int, int]:
    positives, negatives = int(wanted.sum()), int((~wanted).sum())
    if not positives or not negatives:
        held = "every one" if positives else "none"
        raise ConfigError(f"a ROC needs a reference that holds some {what} and lacks others; it holds {held}")
    return positives, negatives


def _from_scores(scores: NDArray[np.float64], wanted: NDArray[np.bool_], what: str) -> Roc:
    positives, negatives = _counts(wanted, what)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(ranked[1:] != ranked[:-1], True)  # of a run of ties
    hits, misses = np.cumsum(wanted[order])[last], np.cumsum(~wanted[order])[last]
    return Roc((0.0, *(misses / negatives).tolist()), (0.0, *(hits / positives).tolist()))


def _from_sets(found: Sequence[NDArray[np.bool_]], wanted: NDArray[np.bool_], what: str) -> Roc:
    positives, negatives = _counts(wanted, what)
    points = {(0.0, 0.0), (1.0, 1.0)}
    points |= {
        (float((one & ~wanted).sum() / negatives), float((one & wanted).sum() / positives)) for one in found
    }
    curve: list[tuple[float, float]] = []
    for x, y in sorted(points):  # at one fpr both the lower and the higher tpr stay: a vertical step
        if not curve or y >= curve[-1][1]:
            curve.append((x, y))
    return Roc(tuple(x for x, _ in curve), tuple(y for _, y in curve))
