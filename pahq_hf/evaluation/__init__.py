"""Judge a circuit, wholly in FP32 (docs/semantics.md, section 6)."""

from importlib import import_module
from typing import Any

_FILES = {
    "Audited": "pahq_hf.evaluation.audit",
    "Completeness": "pahq_hf.evaluation.necessity",
    "Curve": "pahq_hf.evaluation.curves",
    "EvaluationOptions": "pahq_hf.evaluation.report",
    "Evaluator": "pahq_hf.evaluation.evaluator",
    "MIB_FRACTIONS": "pahq_hf.evaluation.curves",
    "Minimality": "pahq_hf.evaluation.necessity",
    "Roc": "pahq_hf.evaluation.roc",
    "accuracy": "pahq_hf.evaluation.greedy_accuracy",
    "audit": "pahq_hf.evaluation.audit",
    "chance": "pahq_hf.evaluation.greedy_accuracy",
    "check_fits": "pahq_hf.evaluation.fits",
    "check_shape": "pahq_hf.evaluation.fits",
    "completeness": "pahq_hf.evaluation.necessity",
    "edge_roc": "pahq_hf.evaluation.roc",
    "evaluate": "pahq_hf.evaluation.report",
    "faithfulness": "pahq_hf.circuit.verdict",
    "faithfulness_curve": "pahq_hf.evaluation.curves",
    "minimality": "pahq_hf.evaluation.necessity",
    "node_roc": "pahq_hf.evaluation.roc",
    "rank_edges": "pahq_hf.evaluation.curves",
    "warn_near_chance": "pahq_hf.evaluation.greedy_accuracy",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FILES[name]), name)
