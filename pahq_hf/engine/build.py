"""Make the engine a run asks for."""

from __future__ import annotations

import logging

from pahq_hf.capture.store import make_store
from pahq_hf.config import Ablation, EngineConfig
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.hooks.gradient_runs import Runs
from pahq_hf.engine.protocol import CircuitRuns, Engine, GradientRuns, Referee
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.setting import Setting
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task

logger = logging.getLogger(__name__)


def make_engine(setting: Setting, config: EngineConfig) -> Engine:
    """Build an engine and let it capture its runs.

    Args:
        setting: Model, task, metric, ablation and precision.
        config: Which engine, and its limits.

    Returns:
        The engine.
    """
    model, task, metric = setting.model, setting.task, setting.metric
    ablation, rule = setting.ablation, setting.rule
    store = make_store(config.activation_store)
    if config.engine != "hooks" and not model.arch.sparse:
        logger.warning(
            "%s mixes tokens in a way that the sparse engine cannot cut: using the hooks engine",
            model.arch.model_type,
        )
    if config.engine == "hooks" or not model.arch.sparse:
        return HooksEngine(model, task, metric, ablation=ablation, rule=rule, store=store)
    return SparseEngine(
        model,
        task,
        metric,
        ablation=ablation,
        rule=rule,
        memory_budget=config.memory_budget,
        store=store,
    )


def make_referee(
    model: PatchedModel, task: Task, metric: str, ablation: Ablation, rule: RegimeRule | None = None
) -> Referee:
    """Build the engine that runs whole models.

    Args:
        model: The patched model.
        task: The prompts.
        metric: What to minimise.
        ablation: What stands in for removed edges.
        rule: How low precision is used; by default everything is computed with weights as they are kept.

    Raises:
        TaskError: If the prompts do not fit the model.
        MetricError: If the task lacks what the metric needs, or a run's metric is NaN.
    """
    return HooksEngine(model, task, metric, ablation=ablation, rule=rule)


def make_dropper(
    referee: Referee,
    model: PatchedModel,
    task: Task,
    metric: str,
    ablation: Ablation,
    rule: RegimeRule | None = None,
) -> Engine:
    """The engine that drops single edges of a circuit fastest: it computes only what each removal changes.

    Args:
        referee: What does it for models and prompts that the sparse engine cannot cut.
        model: The patched model.
        task: The prompts.
        metric: What to minimise.
        ablation: What stands in for removed edges.
        rule: How low precision is used, by the referee too.
    """
    ordered = bool((task.answer_rows.diff() >= 0).all())
    if not model.arch.sparse or not ordered:
        return referee
    return SparseEngine(model, task, metric, ablation=ablation, rule=rule)


def make_gradient_runs(setting: Setting) -> GradientRuns:
    """Capture the runs that attribution takes gradients at.

    Args:
        setting: Model, task, metric, ablation and precision.

    Raises:
        TaskError: If the prompts do not fit the model.
        MetricError: If the task lacks what the metric needs, or the metric is NaN.
    """
    return Runs(setting.model, setting.task, setting.metric, setting.ablation, setting.rule)


def make_circuit_runs(setting: Setting) -> CircuitRuns:
    """Capture the runs that learning takes gradients at circuits near, and keep no more of them than that.

    Args:
        setting: Model, task, metric, ablation and precision.

    Raises:
        TaskError: If the prompts do not fit the model.
        MetricError: If the task lacks what the metric needs, or the metric is NaN.
    """
    runs = Runs(setting.model, setting.task, setting.metric, setting.ablation, setting.rule)
    runs.lighten()
    return runs
