"""Faithfulness over circuit size: CPR and CMD of the MIB benchmark (docs/semantics.md, section 6).

Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark", and its code (hannamw/MIB-circuit-track,
`evaluate_area_under_curve`), which this follows: the k best edges are kept with `k = int(fraction * edges)`,
rounded down, so possibly none; the abscissa is the fraction itself, linear, from .001 to 1; areas are
trapezoid sums and not divided by the width of the interval (.999).

Differences. MIB prunes edges on no path from `input` to `logits` before it runs a circuit; here the circuit
is run as it is. With the interchange ablation that is the same value, since what no input reaches carries its
corrupted activation anyway; with zero or mean ablation it need not be. MIB counts one key and one value edge
per query head where heads share them; here the edges of the model's own graph are counted. MIB leaves the
order of ties to the sorting routine; here they come in model order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.errors import ConfigError, MetricError

# Shares of edges that are kept: MIB's grid.
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

IntArray = NDArray[np.int64]


class Measure(Protocol):
    """What a curve needs of an `Evaluator`.

    Attributes:
        full: The metric of the whole model.
        empty: The metric of no edges.
    """

    full: float
    empty: float

    @property
    def graph(self) -> Graph:
        """The model's graph."""

    def metric_of(self, kept: BoolArray) -> float:
        """The metric of an edge set. [readers, writers]"""


def rank_edges(
    graph: Graph,
    scores: NDArray[np.float64],
    *,
    absolute: bool = False,
    first: BoolArray | None = None,
) -> IntArray:
    """Order edges from the most to the least important; ties come in model order.

    Args:
        graph: The graph.
        scores: A score per edge; positive says that the edge matters. [readers, writers]
        absolute: Order by |score| (CMD) instead of the signed score (CPR).
        first: Edges that come before all others, such as those ACDC kept: its scores of kept and of removed
            edges were measured on different circuits and do not compare. [readers, writers]

    Returns:
        All edges as (reader, writer). [edges, 2]

    Raises:
        ConfigError: If an array has another shape than the graph, or a score is NaN.
    """
    scores = np.asarray(scores, dtype=np.float64)
    _check_shape(graph, scores, "scores")
    pairs = np.argwhere(graph.all_edges)
    values = scores[graph.all_edges]
    if np.isnan(values).any():
        raise ConfigError("a score is NaN: edges cannot be ranked")
    keys = [-np.abs(values) if absolute else -values]
    if first is not None:
        _check_shape(graph, first, "first")
        keys.append(~np.asarray(first, dtype=bool)[graph.all_edges])
    order = np.lexsort(keys)  # stable; the last key is the first to decide
    found: IntArray = pairs[order].astype(np.int64)
    return found


def _check_shape(graph: Graph, array: NDArray[Any], name: str) -> None:
    if np.shape(array) != graph.all_edges.shape:
        raise ConfigError(f"{name} has shape {np.shape(array)}; the graph has {graph.all_edges.shape}")


@dataclass(frozen=True)
class Curve:
    """Faithfulness at growing circuit sizes.

    Attributes:
        fractions: Shares of all edges that were kept, ascending.
        edges: How many edges that is.
        faithfulness: f of each circuit; 0 is the empty one, 1 the whole model, and it can lie outside.
    """

    fractions: tuple[float, ...]
    edges: tuple[int, ...]
    faithfulness: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.fractions) == len(self.edges) == len(self.faithfulness):
            raise ConfigError("a curve needs one edge count and one faithfulness per fraction")

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: area under f; MIB's CPR when edges are ranked by signed score.

        The whole model at every size gives .999, the width of MIB's grid; more is possible, and better.
        """
        return _area(self.fractions, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Circuit-model distance: area under |1 - f|; MIB's CMD when edges are ranked by |score|. 0 is best.

        As in MIB the absolute value is taken at the points of the grid; a line between a point below 1 and
        one above it is not folded.
        """
        return _area(self.fractions, [abs(1.0 - f) for f in self.faithfulness])

    @property
    def cpr_log(self) -> float:
        """The mean of f over the logarithm of the share of edges; 1 for the whole model at every size.

        Sizes up to a fiftieth of the edges, which people read, are 2 % of the linear area and 43 % of this.
        """
        return _mean_by_size(self.fractions, self.faithfulness)

    @property
    def cmd_log(self) -> float:
        """The mean of |1 - f| over the logarithm of the share of edges; as of `cmd`, at the grid's points."""
        return _mean_by_size(self.fractions, [abs(1.0 - f) for f in self.faithfulness])

    def to_dict(self) -> dict[str, Any]:
        """Fields and all areas, for JSON."""
        areas = {"cpr": self.cpr, "cmd": self.cmd, "cpr_log": self.cpr_log, "cmd_log": self.cmd_log}
        return {**asdict(self), **areas}


def _mean_by_size(x: Sequence[float], y: Sequence[float]) -> float:
    """The mean over log x of a line through the points; of those with x above 0. NaN of fewer than two."""
    points = [(math.log(a), b) for a, b in zip(x, y, strict=True) if a > 0]
    if len(points) < 2:
        return math.nan
    logs, values = zip(*points, strict=True)
    return _area(logs, values) / (logs[-1] - logs[0])


def _area(x: Sequence[float], y: Sequence[float]) -> float:
    """Trapezoid sum."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return float((np.diff(xs) * (ys[1:] + ys[:-1]) / 2).sum())


def faithfulness_curve(
    evaluator: Measure, ranking: IntArray, fractions: Sequence[float] = MIB_FRACTIONS
) -> Curve:
    """Faithfulness of the best edges of a ranking, for growing shares of them.

    Args:
        evaluator: Measures circuits.
        ranking: All edges, best first, as `rank_edges` gives them. [edges, 2]
        fractions: Shares of edges, ascending, within 0 and 1.

    Returns:
        The curve.

    Raises:
        ConfigError: If fractions are not ascending or out of range, or the ranking is no order of all edges.
        MetricError: If the whole model's metric is that of no edges at all: f is undefined then.
    """
    shares = tuple(float(fraction) for fraction in fractions)
    if not shares or list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise ConfigError("fractions must ascend within 0 and 1")
    graph = evaluator.graph
    pairs = np.asarray(ranking, dtype=np.int64).reshape(-1, 2)
    seen = graph.no_edges()
    if len(pairs) == graph.edge_count:
        seen[pairs[:, 0], pairs[:, 1]] = True
    if not np.array_equal(seen, graph.all_edges):
        raise ConfigError(f"a ranking must name each of the graph's {graph.edge_count:,} edges once")
    span = evaluator.full - evaluator.empty
    if span == 0:
        raise MetricError("faithfulness is undefined: the metric does not tell the full model from no edges")
    counts = tuple(int(share * graph.edge_count) for share in shares)
    values = {0: evaluator.empty, graph.edge_count: evaluator.full}
    for count in counts:
        if count not in values:
            kept = graph.no_edges()
            kept[pairs[:count, 0], pairs[:count, 1]] = True
            values[count] = evaluator.metric_of(kept)
    return Curve(shares, counts, tuple((values[count] - evaluator.empty) / span for count in counts))
