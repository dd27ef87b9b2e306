"""What a finished search is measured by: the hooks engine, in FP32 and at the search's precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.circuit.confirmation import logit_rounding
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.verdict import Verdict
from pahq_hf.engine.build import make_referee
from pahq_hf.engine.setting import Setting
from pahq_hf.evaluation.evaluator import Evaluator


class Judge:
    """Measures what searches found. Its captured runs serve any number of circuits.

    Args:
        setting: That of the searches.
    """

    def __init__(self, setting: Setting) -> None:
        model, task, metric, ablation = setting.model, setting.task, setting.metric, setting.ablation
        self.evaluator = Evaluator(model, task, metric, ablation)
        self._metric = metric
        self._ablation = ablation
        # `pahq` ends in FP32; the other regimes end at their own precision.
        low = setting.precision.regime in ("rtn", "pahq-literal")
        self._low = make_referee(model, task, metric, ablation) if low else None

    @property
    def means(self) -> dict[str, NDArray[np.float32]]:
        """Mean activations that are kept with the circuits."""
        return self.evaluator.means

    def applied(self, kept: BoolArray, verdict: Verdict) -> dict[str, Any]:
        """How well a circuit answers inside `PAHQModel.apply` (`Evaluator.applied`)."""
        return self.evaluator.applied(kept, self._ablation, self.means, verdict.accuracy)

    def measure(self, kept: BoolArray, final: float) -> tuple[dict[str, Any], Verdict]:
        """A circuit's metric again by the hooks engine, at the search's precision and in FP32.

        Args:
            kept: The circuit. [readers, writers]
            final: Its metric as the search has it.

        Returns:
            `name`, `full`, `empty`, `final`, `final_recomputed`, how far rounding may bring these two apart
            (`tolerance`) and `fp32`; and the verdict on the circuit.
        """
        logits = self.evaluator.logits(kept)
        verdict = self.evaluator.verdict(kept, logits)
        recomputed = verdict.value
        if self._low is not None:
            logits = self._low.logits(kept)
            recomputed = self._low.metric(logits)
        facts = {
            "name": self._metric,
            "full": self.evaluator.full,
            "empty": self.evaluator.empty,
            "final": final,
            "final_recomputed": recomputed,
            "tolerance": self._tolerance(recomputed, logits),
            "fp32": verdict.value,
        }
        return facts, verdict

    def _tolerance(self, value: float, logits: Tensor) -> float:
        """How far the search's value may be from the hooks engine's."""
        largest = max(float(run.abs().max()) for run in (logits, self.evaluator.clean_logits))
        error = logit_rounding(self.evaluator.graph.spec.layers, largest, self._ablation)
        metric = self.evaluator.metric if self._low is None else self._low.metric
        return metric.rounding(logits, value, error)
