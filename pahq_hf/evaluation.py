"""Judge a circuit, wholly in FP32 (semantics.md, section 6)."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit import Circuit
from pahq_hf.config import Ablation, MetricName
from pahq_hf.engine.hooks import HooksEngine
from pahq_hf.errors import CircuitError, ConfigError
from pahq_hf.graph import BoolArray
from pahq_hf.means import means_of
from pahq_hf.metrics import Metric, accuracy
from pahq_hf.patch import PatchedModel
from pahq_hf.tasks.base import Task


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

    def __init__(self, model: PatchedModel, task: Task, metric: MetricName, ablation: Ablation) -> None:
        if ablation not in get_args(Ablation):
            raise ConfigError(f"ablation must be one of {', '.join(get_args(Ablation))}; got {ablation!r}")
        self._model = model
        self._task = task
        model.precision.deactivate()
        with model.precision.full_precision():
            self._engine = HooksEngine(model, task, metric, ablation=ablation)
        self._metric = self._engine.metric
        self._kl = Metric("kl", task, self._engine.clean_logits, model.device)
        self.full = self._metric(self._engine.clean_logits)
        self.empty = self.metric_of(model.graph.no_edges())

    def metric_of(self, kept: BoolArray) -> float:
        """The metric of an edge set."""
        with self._model.precision.full_precision():
            return self._engine.metric_of(kept)

    def means(self) -> dict[str, NDArray[np.float32]]:
        """Mean activations of the corrupted prompts."""
        return means_of(self._engine.corrupted, self._task)

    def report(self, circuit: Circuit) -> dict[str, Any]:
        """Everything measured about one circuit.

        Args:
            circuit: A circuit of this model.

        Returns:
            `kl`, the metric with its full and empty values, `faithfulness`, `accuracy` and edge counts.

        Raises:
            CircuitError: If the circuit is of another graph.
        """
        check_shape(circuit, self._model)
        with self._model.precision.full_precision():
            logits = self._engine.logits(circuit.kept)
        value = self._metric(logits)
        return {
            "kl": self._kl(logits),
            "accuracy": accuracy(logits, self._task),
            "accuracy_full": accuracy(self._engine.clean_logits, self._task),
            "metric": {"name": self._metric.name, "value": value, "full": self.full, "empty": self.empty},
            "faithfulness": faithfulness(value, self.full, self.empty),
            "edges": circuit.edge_count,
            "edges_live": int(circuit.live.sum()),
            "edges_total": circuit.graph.edge_count,
            "examples": len(self._task),
        }


def faithfulness(value: float, full: float, empty: float) -> float | None:
    """`(m(C) - m(empty)) / (m(full) - m(empty))`; None when the task makes no difference at all."""
    return None if full == empty else (value - empty) / (full - empty)


def check_shape(circuit: Circuit, model: PatchedModel) -> None:
    """Check that a circuit's graph is a model's.

    Args:
        circuit: The circuit.
        model: The patched model.

    Raises:
        CircuitError: Naming the first difference.
    """
    ours, theirs = model.spec, circuit.graph.spec
    for name in ("layers", "heads", "kv_groups", "mlps", "parallel", "coupled", "split_kv_groups"):
        mine, its = getattr(ours, name), getattr(theirs, name)
        if mine != its:
            raise CircuitError(
                f"this circuit is of another model: it has {name}={its}, the model has {name}={mine}"
            )
    family, mine = circuit.model.get("model_type"), model.hf.config.model_type
    if family is not None and family != mine:
        raise CircuitError(f"this circuit is of another model: its family is {family}, the model's is {mine}")
    width, mine = circuit.model.get("d_model"), model.hf.config.hidden_size
    if width is not None and width != mine:
        raise CircuitError(f"this circuit is of another model: its d_model is {width}, the model's is {mine}")


def check_fits(
    circuit: Circuit, model: PatchedModel, identity: dict[str, Any], *, any_weights: bool = False
) -> None:
    """Check that a circuit belongs to a model.

    Args:
        circuit: The circuit.
        model: The patched model.
        identity: What identifies the model.
        any_weights: Accept a model of the same shape with other weights, such as a fine-tuned one.

    Raises:
        CircuitError: Naming the first difference.
    """
    check_shape(circuit, model)
    its, mine = circuit.model.get("fingerprint"), identity.get("fingerprint")
    if not any_weights and its is not None and its != mine:
        name, revision = (str(circuit.model.get(key))[:80] for key in ("base_model", "revision"))
        raise CircuitError(
            f"this circuit was found on other weights ({name}, revision {revision}): load those, or allow "
            "any weights of this shape (--any-weights, any_weights=True)"
        )
