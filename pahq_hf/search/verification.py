"""What a finished search is measured by: the hooks engine, in FP32 and at the search's precision."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.circuit.confirmation import logit_rounding
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.run_record import MetricFacts
from pahq_hf.circuit.verdict import Verdict
from pahq_hf.engine.build import make_referee
from pahq_hf.engine.protocol import Referee
from pahq_hf.engine.setting import Setting
from pahq_hf.evaluation.evaluator import Evaluator


class Judge:
    """Measures what searches found. Its captured runs serve any number of circuits.

    Args:
        setting: The setting of the searches.
    """

    def __init__(self, setting: Setting) -> None:
        self.evaluator = Evaluator(setting.model, setting.task, setting.metric, setting.ablation)
        self._setting = setting

    @cached_property
    def _low(self) -> Referee | None:
        """What measures at the searches' precision, where that is not FP32: `pahq` ends in FP32."""
        setting = self._setting
        if setting.precision.regime not in ("rtn", "pahq-literal"):
            return None
        return make_referee(setting.model, setting.task, setting.metric, setting.ablation)

    @property
    def means(self) -> dict[str, NDArray[np.float32]]:
        """Mean activations that are kept with the circuits."""
        return self.evaluator.means

    def applied(self, kept: BoolArray, verdict: Verdict) -> dict[str, Any]:
        """How well a circuit answers inside `PAHQModel.apply` (`Evaluator.applied`)."""
        return self.evaluator.applied(kept, self._setting.ablation, self.means, verdict.accuracy)

    def measure(self, kept: BoolArray, final: float | None) -> tuple[MetricFacts, Verdict]:
        """A circuit's metric again by the hooks engine, at the search's precision and in FP32.

        Args:
            kept: The circuit. [readers, writers]
            final: Its metric as the search has it; None if no engine of the search measured it.

        Returns:
            The metric, with `final_recomputed` and how far rounding may bring that from `final` (`tolerance`)
            where there is one to compare; and the verdict on the circuit.
        """
        logits = self.evaluator.logits(kept)
        verdict = self.evaluator.verdict(kept, logits)
        value = verdict.value
        found = MetricFacts(
            name=self._setting.metric,
            full=self.evaluator.full,
            empty=self.evaluator.empty,
            final=value,
            fp32=value,
        )
        if final is None:
            return found, verdict
        if self._low is not None:
            logits = self._low.logits(kept)
            value = self._low.metric(logits)
        tolerance = self._tolerance(value, logits)
        return replace(found, final=final, final_recomputed=value, tolerance=tolerance), verdict

    def _tolerance(self, value: float, logits: Tensor) -> float:
        """How far the search's value may be from the hooks engine's."""
        largest = max(float(run.abs().max()) for run in (logits, self.evaluator.clean_logits))
        error = logit_rounding(self.evaluator.graph.spec.layers, largest, self._setting.ablation)
        metric = self.evaluator.metric if self._low is None else self._low.metric
        return metric.rounding(logits, value, error)
