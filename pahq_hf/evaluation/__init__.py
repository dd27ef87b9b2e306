"""Judge a circuit, wholly in FP32 (docs/semantics.md, section 6)."""

from pahq_hf.evaluation.accuracy import accuracy, chance, warn_near_chance
from pahq_hf.evaluation.checks import check_fits, check_shape
from pahq_hf.evaluation.curves import MIB_FRACTIONS, Curve, faithfulness_curve, rank_edges
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.evaluation.necessity import Completeness, Minimality, completeness, minimality
from pahq_hf.evaluation.report import EvaluationOptions, evaluate
from pahq_hf.evaluation.roc import Roc, edge_roc, node_roc
from pahq_hf.verdict import faithfulness

__all__ = [
    "MIB_FRACTIONS",
    "Completeness",
    "Curve",
    "EvaluationOptions",
    "Evaluator",
    "Minimality",
    "Roc",
    "accuracy",
    "chance",
    "check_fits",
    "check_shape",
    "completeness",
    "edge_roc",
    "evaluate",
    "faithfulness",
    "faithfulness_curve",
    "minimality",
    "node_roc",
    "rank_edges",
    "warn_near_chance",
]
