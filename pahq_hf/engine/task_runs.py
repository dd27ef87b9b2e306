"""`TaskRuns`: the captured runs that every engine starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import capture
from pahq_hf.capture.store import ActivationStore
from pahq_hf.capture.substitutes import ablated
from pahq_hf.config import Ablation
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.device_memory import memory_for
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import Metric


@dataclass(frozen=True, eq=False)
class TaskRuns:
    """The model's runs on a task, as exact as a regime has them, and the metric that compares with them.

    Attributes:
        clean: On the clean prompts.
        corrupted: On the corrupted ones.
        substitute: What stands in for removed edges.
        metric: What is minimised; it has a value on both runs.
    """

    clean: Activations
    corrupted: Activations
    substitute: Activations
    metric: Metric

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: PatchedModel,
        task: Task,
        metric: str,
        ablation: Ablation,
        rule: RegimeRule,
        store: ActivationStore | None = None,
    ) -> TaskRuns:
        """Run the model.

        Args:
            model: The patched model.
            task: The prompts.
            metric: What to minimise.
            ablation: What stands in for removed edges.
            rule: How low precision is used.
            store: Where captured activations go; memory by default.

        Raises:
            TaskError: If the prompts do not fit the model.
            MetricError: If the task lacks what the metric needs, or the metric of a run is NaN.
            OutOfMemoryError: If memory runs out.
        """
        pairs = f"{len(task)} prompt pair{'' if len(task) == 1 else 's'}"
        what = f"what {pairs} of {task.length} tokens write and read in the model"
        with rule.exactly(model), memory_for(what, model.device):
            clean = capture(model, task, task.clean_ids, store)
            corrupted = capture(model, task, task.corrupted_ids, store)
            substitute = ablated(model, clean, corrupted, task, ablation, store)
            bound = Metric(metric, task, clean.logits, model.device)
            for run in (clean, corrupted):
                bound(run.logits)  # NaN fails here, before anything is searched or written
        return cls(clean, corrupted, substitute, bound)
