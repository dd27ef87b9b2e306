"""Score all edges of a model by the name of a method."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pahq_hf.config import EngineConfig, MethodName
from pahq_hf.engine.build import make_engine, make_gradient_runs
from pahq_hf.engine.phases import Phases
from pahq_hf.engine.setting import Setting
from pahq_hf.precision.memory import trim
from pahq_hf.search.attribution.methods import (
    Scores,
    check_finite,
    check_gradient,
    eap,
    eap_ig,
    exact,
    hisp,
    random_scores,
)
from pahq_hf.search.progress import Progress, Silence


def edge_scores(
    method: MethodName,
    setting: Setting,
    *,
    engine: EngineConfig | None = None,
    steps: int = 5,
    seed: int = 0,
    phases: Phases | None = None,
    on_clean: Callable[[Tensor], None] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score all edges.

    Args:
        method: Name of the method.
        setting: Model, task, metric, ablation and precision.
        engine: Which engine `exact` uses, and its limits.
        steps: Runs whose gradients `eap-ig` averages.
        seed: Of `random`.
        phases: Where seconds are added up.
        on_clean: Called before edges are scored with the clean run's logits at the answer positions
            [rows, vocab]; not by `random`, which runs nothing.
        progress: Who is told how far it is.

    Returns:
        Positive where removing the edge raises the metric, 0 where there is no edge. [readers, writers]

    Raises:
        MetricError: If the method means nothing for the metric, or numbers come out as NaN.
        TaskError: If the prompts do not fit the model.
    """
    try:
        return check_finite(
            _scores(
                method,
                setting,
                engine or EngineConfig(),
                steps,
                seed,
                phases or Phases(),
                on_clean or _ignore,
                progress or Silence(),
            ),
            method,
        )
    finally:
        trim()  # the runs are gone: whoever evaluates or searches next has runs of its own


def _ignore(_: Tensor) -> None:
    """Nobody asked."""


def _scores(
    method: MethodName,
    setting: Setting,
    engine: EngineConfig,
    steps: int,
    seed: int,
    phases: Phases,
    on_clean: Callable[[Tensor], None],
    progress: Progress,
) -> Scores:
    model, task = setting.model, setting.task
    check_gradient(method, setting.metric)
    if method == "random":
        return random_scores(model.graph, seed)
    model.precision.deactivate()
    if method == "exact":
        with phases("capture"), progress.phase("capturing"):
            computes = make_engine(setting, engine)
        on_clean(computes.clean_logits)
        with phases("scores"), progress.count(method, "edge", model.graph.edge_count) as count:
            return exact(computes, count.advance)
    with phases("capture"), progress.phase("capturing"):
        runs = make_gradient_runs(setting)
    on_clean(runs.clean.logits)
    passes = steps if method == "eap-ig" else 1
    with phases("scores"), progress.count(method, "prompt", passes * len(task)) as count:
        if method == "eap-ig":
            return eap_ig(runs, steps, count.advance)
        return eap(runs, count.advance) if method == "eap" else hisp(runs, count.advance)
