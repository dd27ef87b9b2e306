"""Make the engine a run asks for."""

from __future__ import annotations

import logging

from pahq_hf.config import Ablation, EngineConfig, MetricName, PAHQConfig
from pahq_hf.engine.hooks import HooksEngine
from pahq_hf.engine.rule import PrecisionRule
from pahq_hf.engine.sparse import SparseEngine
from pahq_hf.patch import PatchedModel
from pahq_hf.store import make_store
from pahq_hf.tasks.base import Task

logger = logging.getLogger(__name__)


def make_engine(
    model: PatchedModel,
    task: Task,
    metric: MetricName,
    ablation: Ablation,
    pahq: PAHQConfig,
    config: EngineConfig,
) -> HooksEngine | SparseEngine:
    """Build an engine and let it capture its runs.

    Args:
        model: The patched model.
        task: The prompts.
        metric: What to minimise.
        ablation: What stands in for removed edges.
        pahq: Precision regime.
        config: Which engine, and its limits.

    Returns:
        The engine.
    """
    rule = PrecisionRule.of(pahq, model.device)
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
