"""Judge a circuit, wholly in FP32 (docs/semantics.md, section 6)."""

from __future__ import annotations

from functools import cached_property
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.capture.mean_activations import Means, circuit_means
from pahq_hf.circuit.ablation import CORRUPTED, FULL, plain_ablation
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.fitting import fitted
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.circuit.verdict import Verdict, faithfulness
from pahq_hf.config import Ablation
from pahq_hf.engine.build import make_dropper, make_referee
from pahq_hf.engine.hooks.apply import plain_substitute
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.regime_rule import EXACT
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.applied import applied_logits, partner_of
from pahq_hf.evaluation.fits import check_shape
from pahq_hf.evaluation.greedy_accuracy import accuracy
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.holding import Holding
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import Metric


class Evaluator:
    """Metrics of circuits on one task, in FP32 whatever the model's precision.

    Args:
        model: The patched model.
        task: The prompts.
        metric: The metric whose faithfulness is reported.
        ablation: What stands in for removed edges.

    Raises:
        ConfigError: If the ablation is unknown.
        MetricError: If the task lacks what the metric needs, or a run's metric is NaN.
    """

    def __init__(self, model: PatchedModel, task: Task, metric: str, ablation: Ablation) -> None:
        if ablation not in get_args(Ablation):
            raise ConfigError(f"ablation must be one of {', '.join(get_args(Ablation))}; got {ablation!r}")
        self._model = model
        self._task = task
        self._engine = make_referee(model, task, metric, ablation, EXACT)
        self.metric: Metric = self._engine.metric
        self._ablation: Ablation = ablation
        self._kl = Metric("kl", task, self._engine.clean_logits, model.device)
        self.full = self.metric(self._engine.clean_logits)
        self.empty = self.metric_of(model.graph.no_edges())

    @property
    def graph(self) -> Graph:
        """The model's graph."""
        return self._model.graph

    @property
    def clean_logits(self) -> Tensor:
        """The full model's logits. [rows, vocab]"""
        return self._engine.clean_logits

    def logits(self, kept: BoolArray) -> Tensor:
        """Logits of an edge set. [rows, vocab]"""
        return self._engine.logits(kept)

    def metric_of(self, kept: BoolArray) -> float:
        """The metric of an edge set."""
        return self._engine.metric_of(kept)

    def drop_effects(self, kept: BoolArray) -> NDArray[np.float64]:
        """What removing each edge of a circuit alone adds to the metric.

        The sparse engine computes only what each removal changes; models it cannot cut run whole.

        Args:
            kept: The circuit. [readers, writers]

        Returns:
            m(C without the edge) - m(C), 0 where there is no edge. [readers, writers]
        """
        name = self.metric.name
        engine = make_dropper(self._engine, self._model, self._task, name, self._ablation, EXACT)
        try:
            return engine.drop_each(kept)
        finally:
            engine.finish()

    @property
    def prompts(self) -> str:
        """What identifies the prompts (`Task.fingerprint`)."""
        return self._task.fingerprint()

    def tester(self, metric: str, ablation: Ablation) -> Engine:
        """An engine that tests edges in FP32 as a search does, the sparse one where it can.

        Args:
            metric: What the search minimised.
            ablation: What stood in for removed edges.
        """
        model, task, referee = self._model, self._task, self._engine
        if (metric, ablation) != (self.metric.name, self._ablation):
            referee = make_referee(model, task, metric, ablation, EXACT)
        return make_dropper(referee, model, task, metric, ablation, EXACT)

    @cached_property
    def means(self) -> dict[str, NDArray[np.float32]]:
        """Mean activations that are kept with a circuit found on these prompts, under this ablation.

        Pooled and by position: those of the ablation `mean` are of the clean prompts, all others of the
        corrupted ones. By position where the ablation is, or where all prompts are of one length.
        """
        engine, task, by_mean = self._engine, self._task, self._ablation in ("mean", "mean-corrupted")
        one_length = int(task.attention_mask.sum(-1).unique().numel()) == 1
        with self._model.used_by(Holding()):  # whatever components somebody has in FP32
            return circuit_means(
                self._model,
                task,
                engine.substitute if by_mean else engine.corrupted,
                task.clean_ids if self._ablation == "mean" else task.corrupted_ids,
                by_position=by_mean or one_length,
            )

    def applied(self, kept: BoolArray, found: str | None, means: Means | None, own: float) -> dict[str, Any]:
        """How well a circuit answers inside `PAHQModel.apply`, with corrupted prompts and without.

        Args:
            kept: The circuit. [readers, writers]
            found: The ablation it was found under; what is kept with it stands for that.
            means: The means kept with it.
            own: Its accuracy under this evaluator's ablation.

        Returns:
            `ablation`, the name of what stands in without corrupted prompts (None if nothing does), and
            `accuracy`: shares of right answers under each ablation by name, and of the full model.
        """
        model, task, clean = self._model, self._task, self._engine.clean_logits
        shares = {FULL: accuracy(clean, task, clean), self._ablation: own}
        if CORRUPTED not in shares:
            logits = applied_logits(model, kept, task, lambda part: partner_of(model, part))
            shares[CORRUPTED] = accuracy(logits, task, clean)
        plain, substitute = plain_ablation(found, means), plain_substitute(model, found, means)
        if plain is not None and substitute is not None:
            shares[plain] = accuracy(applied_logits(model, kept, task, lambda _: substitute), task, clean)
        return {"ablation": plain, "accuracy": shares}

    def report(self, circuit: Circuit) -> dict[str, Any]:
        """Everything measured about one circuit.

        Args:
            circuit: A circuit of this model.

        Returns:
            `kl`, the metric with its full and empty values, `faithfulness`, `accuracy`, edge counts,
            `sparsity` (the share of edges that are gone) and, if the task has answers and distractors,
            `logit_diff` of the circuit and `logit_diff_full` (answer minus distractor, means over sets).

        Raises:
            CircuitError: If the circuit is of another graph.
        """
        circuit = fitted(circuit, self._model.spec)
        check_shape(circuit, self._model)
        logits = self.logits(circuit.kept)
        value = self.metric(logits)
        return {
            "kl": self._kl(logits),
            "accuracy": self._accuracy(logits),
            "accuracy_full": self._accuracy(self._engine.clean_logits),
            "metric": {"name": self.metric.name, "value": value, "full": self.full, "empty": self.empty},
            "faithfulness": faithfulness(value, self.full, self.empty),
            **self._logit_diffs(logits),
            "edges": circuit.edge_count,
            "edges_live": int(circuit.live.sum()),
            "edges_total": circuit.graph.edge_count,
            "sparsity": 1 - circuit.edge_count / circuit.graph.edge_count,
            "examples": len(self._task),
        }

    def verdict(self, kept: BoolArray, logits: Tensor | None = None) -> Verdict:
        """Measure an edge set for the verdict of a run.

        Args:
            kept: Its edges. [readers, writers]
            logits: Its logits, where they are known. [rows, vocab]

        Returns:
            The verdict; its `value` is what `metric_of` gives.
        """
        logits = self.logits(kept) if logits is None else logits
        return Verdict(
            metric=self.metric.name,
            value=self.metric(logits),
            full=self.full,
            empty=self.empty,
            accuracy=self._accuracy(logits),
            accuracy_full=self._accuracy(self._engine.clean_logits),
            has_answers=self._task.has_answers,
            kept=int(kept.sum()),
            live=int(self.graph.live_edges(kept).sum()),
            total=self.graph.edge_count,
        )

    def _accuracy(self, logits: Tensor) -> float:
        return accuracy(logits, self._task, self._engine.clean_logits)

    def _logit_diffs(self, logits: Tensor) -> dict[str, float]:
        if not (self._task.has_answers and self._task.has_distractors):
            return {}
        minimised = Metric("logit_diff", self._task, None, self._model.device)
        runs = {"logit_diff": logits, "logit_diff_full": self._engine.clean_logits}
        return {name: -minimised(run) for name, run in runs.items()}
