"""One attribution from model and task to circuit: scores, edges, evaluation, facts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.ablation import APPLY
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.files import output_path, refuse_overwrite
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.verdict import Verdict, announce
from pahq_hf.config import AttributionConfig, EngineConfig, MetricName, PAHQConfig
from pahq_hf.engine.phases import Phases
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.evaluation.greedy_accuracy import warn_near_chance
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.flags import exact_products
from pahq_hf.precision.memory import PeakMemory
from pahq_hf.precision.threads import threads
from pahq_hf.search.attribution.methods import check_gradient
from pahq_hf.search.attribution.scoring import edge_scores
from pahq_hf.search.attribution.selection import edges_from, top_edges
from pahq_hf.search.hardware import hardware_facts
from pahq_hf.search.lock import RunLock
from pahq_hf.search.pipeline import versions
from pahq_hf.search.progress import make_progress
from pahq_hf.tasks.base import Task
from pahq_hf.tasks.metrics import check_metric


class Attribution:
    """Scores all edges of a model on a task and keeps the best.

    Args:
        model: The patched model.
        identity: What identifies the base model, stored with the circuit.
        task: The prompts.
        pahq: The model's precision.
        config: Method and choice of edges.
        engine: How `exact` computes metrics.
        progress: Say on stderr how far it is.

    Raises:
        MetricError: If the task lacks what the metric needs, or the method means nothing for it.
        ConfigError: If more edges are asked for than there are.
    """

    def __init__(
        self,
        model: PatchedModel,
        identity: dict[str, Any],
        task: Task,
        pahq: PAHQConfig,
        config: AttributionConfig,
        engine: EngineConfig | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.identity = identity
        self.task = task
        self.pahq = pahq
        self.config = config
        self.engine = engine or EngineConfig()
        self.reporter = make_progress(progress)
        self.metric: MetricName = config.metric or task.metric
        check_metric(self.metric, task)
        check_gradient(config.method, self.metric)
        if config.topn is not None and config.topn > model.graph.edge_count:
            raise ConfigError(
                f"this model has {model.graph.edge_count:,} edges; cannot keep {config.topn:,} of them"
            )

    @exact_products()
    def run(self, out: str | Path | None = None, *, take_over: bool = False) -> Circuit:
        """Score, choose, evaluate, and (given `out`) save.

        Args:
            out: Folder for the circuit; None keeps everything in memory.
            take_over: Take the place of another machine's process that works in `out`.

        Returns:
            The circuit.

        Raises:
            RunError: If `out` cannot be written, holds another run, or is in use by another process.
        """
        with threads(self.engine.threads):
            if out is None:
                return self._run()
            folder = output_path(out)
            with RunLock(folder, take_over=take_over) as lock:  # what cannot be written fails before any work
                refuse_overwrite(folder)
                circuit = self._run()
                lock.check()
                with self.reporter.phase("saving and drawing"):
                    circuit.save_pretrained(folder)
            return circuit

    def _run(self) -> Circuit:
        phases = Phases()
        with PeakMemory(self.model.device) as peak:
            started = time.perf_counter()
            config = self.config
            scores = edge_scores(
                config.method,
                Setting(self.model, self.task, self.metric, config.ablation, self.pahq),
                engine=self.engine,
                steps=config.steps,
                seed=config.seed,
                phases=phases,
                progress=self.reporter,
                on_clean=lambda logits: warn_near_chance(logits, self.task),
            )
            kept = self._choose(scores)
            with phases("evaluate"), self.reporter.phase("verifying"):
                (metric, verdict), applied, means = self._evaluate(kept)
            phases.seconds["total"] = time.perf_counter() - started
        facts = self._facts(kept) | {"metric": metric, "verdict": verdict.to_dict(), APPLY: applied}
        facts["seconds"] = {name: round(value, 3) for name, value in phases.seconds.items()}
        facts["peak_memory"] |= peak.report()
        tested = self.model.graph.all_edges.copy()
        circuit = Circuit(self.model.graph, kept, scores, tested, dict(self.identity), facts, means)
        if config.topn is not None or config.threshold is not None:  # else all edges were asked for
            announce(verdict, config.method)
        return circuit

    # -- steps ------------------------------------------------------------------------------------

    def _choose(self, scores: NDArray[np.float64]) -> BoolArray:
        graph, config = self.model.graph, self.config
        if config.threshold is not None:
            return edges_from(graph, scores, config.threshold, absolute=config.absolute)
        count = graph.edge_count if config.topn is None else config.topn
        return top_edges(graph, scores, count, absolute=config.absolute)

    def _evaluate(
        self, kept: BoolArray
    ) -> tuple[tuple[dict[str, Any], Verdict], dict[str, Any], dict[str, NDArray[np.float32]]]:
        """The metric in FP32, the verdict, how well it answers in `apply`, and what is kept for that."""
        ablation = self.config.ablation
        evaluator = Evaluator(self.model, self.task, self.metric, ablation)
        verdict = evaluator.verdict(kept)
        final = verdict.value
        facts = {
            "name": self.metric,
            "full": evaluator.full,
            "empty": evaluator.empty,
            "final": final,
            "fp32": final,
        }
        applied = evaluator.applied(kept, ablation, evaluator.means, verdict.accuracy)
        return (facts, verdict), applied, evaluator.means

    def _facts(self, kept: BoolArray) -> dict[str, Any]:
        graph, weights = self.model.graph, self.model.precision
        return {
            "method": self.config.method,
            "header": {
                "model": self.identity.get("fingerprint"),
                "task": self.task.fingerprint(),
                "dtype": str(self.model.hf.dtype).removeprefix("torch."),
            },
            "arguments": self.config.to_dict() | {"metric": self.metric},
            "precision": self.pahq.to_dict(),
            "task": {"name": self.task.name, "examples": len(self.task), **self.task.source},
            "versions": versions() | {"device": str(self.model.device)},
            **hardware_facts(self.model.device),
            "edges": {
                "total": graph.edge_count,
                "tested": graph.edge_count,
                "untested": 0,
                "kept": int(kept.sum()),
                "live": int(graph.live_edges(kept).sum()),
            },
            "peak_memory": {
                "linear_weights": weights.nbytes,
                "linear_weights_fp32": weights.nbytes_fp32,
            },
        }
