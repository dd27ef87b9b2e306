"""Masks over all edges, learned by gradient descent, and the circuits of their best edges.

A mask is a share of every edge: a reader reads `z a_w + (1 - z) c_w` of a writer, where z is the share, `a_w`
what the writer writes and `c_w` what stands in for it. Shares are drawn anew in every step, from what is
learned (`edge_pruning`, `ugs`), and each step sees other prompt pairs. There are twenty stretches: at the end
of each the circuit of the best edges is measured, and the one that is nearest to the full model on the pairs
that judge is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.precision.memory import trim
from pahq_hf.search.course import Beginning, Measures, Passed, kept_beginning
from pahq_hf.search.kind import Found
from pahq_hf.search.learned import Level, keep_level, keep_scores, kept_levels, load_scores
from pahq_hf.search.learners import in_two
from pahq_hf.search.mask_options import MaskOptions
from pahq_hf.search.minibatches import Minibatch, Minibatches, minibatches_of
from pahq_hf.search.pairs import learned_from
from pahq_hf.search.work import Work

logger = logging.getLogger(__name__)
Floats = NDArray[np.float64]
OptionsT = TypeVar("OptionsT", bound=MaskOptions)
_STRETCHES = 20  # of a search
_OPEN = 0.5  # mean share of the edges that are left out, above which masks have not parted


@dataclass(frozen=True)
class Adam:
    """How parameters follow their gradients.

    Attributes:
        second: How long squares of gradients are remembered.
        clip: The longest gradient that is followed as it is.
        decay: Share of each parameter that goes in a step of rate 1.
        first: How long gradients are remembered.
        smallest: Added to the root of squares.
    """

    second: float
    clip: float
    decay: float = 0.0
    first: float = 0.9
    smallest: float = 1e-8


class Method(Protocol):
    """How masks are drawn, and what is learned of them."""

    @property
    def adam(self) -> Adam:
        """How its parameters follow their gradients."""

    @property
    def samples(self) -> int:
        """Masks that are drawn for each pair of a step."""

    def start(self) -> Floats:
        """Parameters to start from: one of each edge, better if higher, and others behind them."""

    def rate(self, step: int) -> float:
        """How far parameters move in a step."""

    def gradient(self, parameters: Floats, step: int, batch: Minibatch) -> tuple[float, Floats]:
        """The gap under masks that are drawn for a step, and the direction in which parameters leave.

        Args:
            parameters: What is learned.
            step: Which step; the same draws the same.
            batch: Its pairs.

        Returns:
            `|m - m(full)|`, and what is subtracted from parameters but for its scale.
        """

    def shares(self, parameters: Floats) -> Floats:
        """How often a mask lets something of each edge through, on average. [edges]"""


@dataclass(frozen=True, eq=False)
class Masks:
    """What is learned after some stretches, and what the next steps need.

    Attributes:
        level: Stretches that are done.
        parameters: Of the method: those of the edges first, in the order of the graph.
        mean: Of gradients, moving. [parameters]
        square: Of their squares. [parameters]
        nearest: Parameters of edges at the end of the stretch whose circuit is kept. [edges]
    """

    level: int
    parameters: Floats
    mean: Floats
    square: Floats
    nearest: Floats

    def check(self, graph: Graph) -> None:
        """Check that they can be of a graph.

        Raises:
            ValueError: If not.
        """
        shapes = {array.shape for array in (self.parameters, self.mean, self.square)}
        if len(shapes) > 1 or self.nearest.shape != (graph.edge_count,) or self.parameters.ndim != 1:
            raise ValueError("its masks are not those of the graph")
        if len(self.parameters) < graph.edge_count or self.parameters.dtype != np.float64:
            raise ValueError("its masks are not those of the graph")


def spread(graph: Graph, values: Floats, rest: float = 0.0) -> Floats:
    """Values of edges in the order of the graph as a matrix, or as one for each row of them.

    Args:
        graph: The graph.
        values: [edges] or [rows, edges]
        rest: What stands where there is no edge.

    Returns:
        [readers, writers] or [rows, readers, writers]
    """
    found = np.full((*values.shape[:-1], *graph.all_edges.shape), rest)
    found[..., graph.all_edges] = values
    return found


def learn_masks(work: Work[OptionsT], make: Callable[[Graph, OptionsT], Method]) -> Found:
    """Learn a mask, and keep as many of its best edges as are asked for.

    Its steps are what it begins with, then stretches of learning.

    Args:
        work: The search.
        make: Makes its method.

    Returns:
        What it found. Scores rank all edges: 1 for the best, towards 0 for the worst.

    Raises:
        RunError: If what an interrupted run kept is damaged, or a step cannot be written.
    """
    return in_two(work, partial(_learned, work, make(work.graph, work.options)))


def check(work: Work[OptionsT], found: Found) -> None:
    """Check that a circuit is what a finished search found.

    Args:
        work: The search, which only reads.
        found: The circuit.

    Raises:
        RunError: If it is not, or what the search kept is damaged.
    """
    if not work.steps or work.folder is None:
        return
    bounds = _bounds(work.options.steps)
    kept_beginning(work)
    levels = kept_levels(work, len(bounds))
    masks = load_scores(work, levels, Masks)
    if masks is None or len(levels) < len(bounds):
        return
    if not np.array_equal(_circuit(work, masks.nearest), found.kept):
        raise work.other_circuit()


def _learned(work: Work[OptionsT], method: Method, measures: Measures, beginning: Beginning) -> Found:
    options, graph = work.options, work.graph
    tasks = learned_from(measures.split, work.setting, options.learn_pairs, options.seed)

    def batches() -> Minibatches:
        least, seed = options.minibatch, options.seed
        return minibatches_of(tasks, least, seed, work.setting, work.circuit_runs, method.samples)

    masks, levels = _learn(work, measures, beginning, method, batches)
    taken = _nearest(beginning, levels)
    level = levels[taken]
    kept = _circuit(work, masks.nearest)
    passed = Passed(kept, level.metric, level.validation)
    shares = method.shares(masks.parameters)
    parted = _have_parted(shares, shares.size if options.edges is None else options.edges)
    if not parted and not work.is_hushed:
        logger.warning(
            "%s: masks did not part in %d steps: most of the edges that are left out are still open, so that "
            "which ones are kept is mostly chance; raise --steps",
            options.search,
            options.steps,
        )
    facts: dict[str, Any] = {
        "taken": taken + 1,
        "stretches": len(levels),
        "expected_edges": float(shares.sum()),
        "parted": parted,
        "learned_on": sum(map(len, tasks)),
        **measures.facts(beginning, passed),
    }
    places = np.empty(graph.edge_count)
    places[np.argsort(-masks.nearest, kind="stable")] = np.arange(graph.edge_count)
    return Found(
        kept,
        spread(graph, 1 - places / graph.edge_count),
        graph.no_edges(),  # masks rank edges; no test decides one
        final=level.metric,
        facts={"masks": facts},
        label=f"{options.search}, {options.edges} edges",
    )


def _learn(
    work: Work[OptionsT],
    measures: Measures,
    beginning: Beginning,
    method: Method,
    batches: Callable[[], Minibatches],
) -> tuple[Masks, list[Level]]:
    """Learn the stretches that an interrupted run has not, and keep each.

    Returns:
        What they came to, and what the journal says of them.
    """
    bounds = _bounds(work.options.steps)
    levels = kept_levels(work, len(bounds))
    if len(work.steps) > 1 + len(levels):
        raise work.damaged(2 + len(levels), ": a stretch of learning should stand there, or nothing")
    masks = load_scores(work, levels, Masks)
    if masks is not None and masks.level > len(levels):  # it stopped between the two
        passed = measures.of_circuit(_circuit(work, masks.parameters))
        levels.append(keep_level(work, masks, passed))
    if masks is None:
        start = method.start()
        none = np.zeros(start.shape)
        masks = Masks(0, start, none, none, start[: work.graph.edge_count])
    if masks.level == len(bounds):
        return masks, levels
    runs = batches()
    try:
        with work.phase("learn"), work.progress.count("learning masks", "step", work.options.steps) as count:
            count.advance(bounds[masks.level - 1] if masks.level else 0)

            def on_step(gap: float) -> None:
                count.note(gap=f"{gap:.4g}")
                count.advance(1)

            while masks.level < len(bounds):
                first = bounds[masks.level - 1] if masks.level else 0
                masks = _follow(masks, method, runs, range(first, bounds[masks.level]), on_step)
                passed = measures.of_circuit(_circuit(work, masks.parameters))
                if all(beginning.gap(passed) <= beginning.gap(level) for level in levels):
                    masks = replace(masks, nearest=masks.parameters[: work.graph.edge_count])
                keep_scores(work, masks)
                levels.append(keep_level(work, masks, passed))
        return masks, levels
    finally:
        del runs
        trim()


def _follow(
    masks: Masks, method: Method, batches: Minibatches, steps: range, on_step: Callable[[float], None]
) -> Masks:
    """Follow gradients for a stretch."""
    adam, parameters = method.adam, masks.parameters
    mean, square = masks.mean, masks.square
    for step in steps:
        gap, gradient = method.gradient(parameters, step, batches[step % len(batches)])
        gradient = gradient * min(1.0, adam.clip / max(float(np.linalg.norm(gradient)), 1e-300))
        mean = adam.first * mean + (1 - adam.first) * gradient
        square = adam.second * square + (1 - adam.second) * gradient**2
        root = np.sqrt(square / (1 - adam.second ** (step + 1))) + adam.smallest
        rate = method.rate(step)
        parameters = (1 - rate * adam.decay) * parameters
        parameters = parameters - rate * mean / (1 - adam.first ** (step + 1)) / root
        on_step(gap)
    return replace(masks, level=masks.level + 1, parameters=parameters, mean=mean, square=square)


def _have_parted(shares: Floats, edges: int) -> bool:
    """Whether masks of edges beyond the best are rather shut than open: else their ranks say little.

    Args:
        shares: How open each is. [edges]
        edges: How many are kept.
    """
    others = np.sort(shares)[: max(0, len(shares) - edges)]
    return not len(others) or float(others.mean()) <= _OPEN


def _bounds(steps: int) -> list[int]:
    """The steps after which each stretch is done."""
    count = min(_STRETCHES, steps)
    return [round(steps * number / count) for number in range(1, count + 1)]


def _circuit(work: Work[OptionsT], values: Floats) -> BoolArray:
    """The circuit of the best edges, as many as are asked for. [readers, writers]"""
    graph = work.graph
    kept = np.zeros(graph.edge_count, dtype=bool)
    kept[np.argsort(-values[: graph.edge_count], kind="stable")[: work.options.edges]] = True
    found = graph.no_edges()
    found[graph.all_edges] = kept
    return found


def _nearest(beginning: Beginning, levels: Sequence[Level]) -> int:
    """Which stretch's circuit is the nearest; of equal ones the last."""
    gaps = [beginning.gap(level) for level in levels]
    return max(number for number, gap in enumerate(gaps) if gap == min(gaps))
