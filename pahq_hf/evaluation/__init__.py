"""Judge a circuit, wholly in FP32 (semantics.md, section 6)."""

from pahq_hf.evaluation.checks import check_fits, check_shape
from pahq_hf.evaluation.curves import MIB_FRACTIONS, Curve, faithfulness_curve, rank_edges
from pahq_hf.evaluation.evaluator import Evaluator, faithfulness
from pahq_hf.evaluation.roc import Roc, edge_roc, node_roc

__all__ = [
    "MIB_FRACTIONS",
    "Curve",
    "Evaluator",
    "Roc",
    "check_fits",
    "check_shape",
    "edge_roc",
    "faithfulness",
    "faithfulness_curve",
    "node_roc",
    "rank_edges",
]
