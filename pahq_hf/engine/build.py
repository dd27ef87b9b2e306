"""Make the engine a run asks for."""

from __future__ import annotations

import logging

from pahq_hf.config import EngineConfig
from pahq_hf.engine.hooks import HooksEngine
from pahq_hf.engine.setting import Setting
from pahq_hf.engine.sparse import SparseEngine
from pahq_hf.store import make_store

logger = logging.getLogger(__name__)


def make_engine(setting: Setting, config: EngineConfig) -> HooksEngine | SparseEngine:
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
