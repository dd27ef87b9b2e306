"""Score all edges of a model by the name of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from pahq_hf.circuit.graph import Graph
from pahq_hf.engine.protocol import Engine, GradientRuns
from pahq_hf.engine.setting import Setting
from pahq_hf.precision.memory import trim
from pahq_hf.search.attribution.kinds import MEMBERS, METHODS, MethodName, check_gradient, methods_of
from pahq_hf.search.attribution.methods import (
    Done,
    Scores,
    check_finite,
    clean_corrupted,
    eap,
    eap_ig,
    eap_ig_activations,
    exact,
    gim,
    hisp,
    mean_of_shares,
    passes_over_activations,
    random_scores,
)
from pahq_hf.search.progress import Progress
from pahq_hf.search.units import Edges, Units


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
    members: str = MEMBERS,
    units: Units | None = None,
    known: Mapping[int, Mapping[int, float]] | None = None,
    on_reader: Callable[[int, Mapping[int, float]], None] | None = None,
) -> Scores:
    """Score all edges, or all nodes.

    Args:
        method: Name of the method.
        captures: A setting, and its runs.
        steps: Runs whose gradients `eap-ig` averages, and `eap-ig-activations` for each writer.
        seed: Of `random`.
        members: Methods of `ensemble`, with commas between them.
        units: What is scored, which the engine of `captures` removes; edges by default.
        known: Scores of readers that `exact` need not compute again, by reader and writer.
        on_reader: Called with the scores of every reader that `exact` has finished.

    Returns:
        Positive where removing the edge raises the metric, 0 where there is no edge. [readers, writers] of
        the graph of the units

    Raises:
        MetricError: If the method means nothing for the metric, or numbers come out as NaN.
        TaskError: If the prompts do not fit the model.
    """
    names, units = methods_of(method, members), units or Edges(captures.setting.graph)
    for name in names:
        check_gradient(name, captures.setting.metric)
    runs = cache(captures.gradients)  # members of an ensemble share them

    def scores_of(name: MethodName) -> Scores:
        if name == "random":
            return random_scores(units.graph, seed)
        if name == "exact":
            return _exactly(captures, units, known or {}, on_reader)
        return units.scores(_by_gradients(name, captures, runs, steps), adds_up=METHODS[name].adds_up)

    try:
        found = [check_finite(scores_of(name), name) for name in names]
    finally:
        runs.cache_clear()
        trim()  # the runs are gone: whoever evaluates or searches next has runs of its own
    return mean_of_shares(found) if method == "ensemble" else found[0]


def _exactly(
    captures: Captures,
    units: Units,
    known: Mapping[int, Mapping[int, float]],
    on_reader: Callable[[int, Mapping[int, float]], None] | None,
) -> Scores:
    engine, done, total = captures.engine, sum(map(len, known.values())), units.graph.edge_count
    with captures.phase("scores"), captures.progress.count("exact", units.word, total, done) as count:
        return exact(engine, count.advance, known=known, on_reader=on_reader)


@dataclass(frozen=True)
class _ByGradients:
    """How a method makes scores of gradients.

    Attributes:
        score: Of runs and a number of steps, with what is called as prompts are done.
        passes: Gradients that are taken of each prompt, of a graph and a number of steps.
    """

    score: Callable[[GradientRuns, int, Done], Scores]
    passes: Callable[[Graph, int], int] = lambda graph, steps: 1


_BY_GRADIENTS: Mapping[MethodName, _ByGradients] = {
    "eap": _ByGradients(lambda runs, _, done: eap(runs, done)),
    "eap-ig": _ByGradients(eap_ig, lambda graph, steps: steps),
    "eap-ig-activations": _ByGradients(eap_ig_activations, passes_over_activations),
    "clean-corrupted": _ByGradients(
        lambda runs, _, done: clean_corrupted(runs, done), lambda graph, steps: 2
    ),
    "gim": _ByGradients(lambda runs, _, done: gim(runs, done)),
    "hisp": _ByGradients(lambda runs, _, done: hisp(runs, done)),
}


def _by_gradients(
    method: MethodName, captures: Captures, make_runs: Callable[[], GradientRuns], steps: int
) -> Scores:
    runs, way = make_runs(), _BY_GRADIENTS[method]
    prompts = way.passes(captures.setting.graph, steps) * len(captures.setting.task)
    with captures.phase("scores"), captures.progress.count(method, "prompt", prompts) as count:
        return way.score(runs, steps, count.advance)
