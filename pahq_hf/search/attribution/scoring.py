"""Score all edges of a model by the name of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from pahq_hf.engine.protocol import Engine, GradientRuns
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
from pahq_hf.search.attribution.options import MethodName
from pahq_hf.search.progress import Progress


class Captures(Protocol):
    """Where a method has the runs from that it works on."""

    setting: Setting
    progress: Progress

    @property
    def engine(self) -> Engine:
        """What computes metrics."""

    def gradients(self) -> GradientRuns:
        """Runs whose gradients can be taken."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count the seconds inside under a name."""


def edge_scores(
    method: MethodName,
    captures: Captures,
    *,
    steps: int = 5,
    seed: int = 0,
    known: Mapping[int, Mapping[int, float]] | None = None,
    on_reader: Callable[[int, Mapping[int, float]], None] | None = None,
) -> Scores:
    """Score all edges.

    Args:
        method: Name of the method.
        captures: A setting, and its runs.
        steps: Runs whose gradients `eap-ig` averages.
        seed: Of `random`.
        known: Scores of readers that `exact` need not compute again, by reader and writer.
        on_reader: Called with the scores of every reader that `exact` has finished.

    Returns:
        Positive where removing the edge raises the metric, 0 where there is no edge. [readers, writers]

    Raises:
        MetricError: If the method means nothing for the metric, or numbers come out as NaN.
        TaskError: If the prompts do not fit the model.
    """
    setting, progress = captures.setting, captures.progress
    check_gradient(method, setting.metric)
    if method == "random":
        return random_scores(setting.graph, seed)
    if method == "exact":
        engine, known = captures.engine, known or {}
        done = sum(map(len, known.values()))
        with (
            captures.phase("scores"),
            progress.count(method, "edge", setting.graph.edge_count, done) as count,
        ):
            scores = exact(engine, count.advance, known=known, on_reader=on_reader)
        return check_finite(scores, method)
    try:
        return check_finite(_by_gradients(method, captures, steps), method)
    finally:
        trim()  # the runs are gone: whoever evaluates or searches next has runs of its own


def _by_gradients(method: MethodName, captures: Captures, steps: int) -> Scores:
    runs = captures.gradients()
    prompts = (steps if method == "eap-ig" else 1) * len(captures.setting.task)
    with captures.phase("scores"), captures.progress.count(method, "prompt", prompts) as count:
        if method == "eap-ig":
            return eap_ig(runs, steps, count.advance)
        return eap(runs, count.advance) if method == "eap" else hisp(runs, count.advance)
