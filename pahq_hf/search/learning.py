"""Learned scores of edges: which make the best circuit of a size, by gradients at circuits of that size.

Scores of all edges are learned by gradient descent on the gap of the circuit of the k best,
`|m(C) - m(full)|`. Choosing the k best has no gradient; that in the share of every edge, kept or gone, at the
circuit itself stands in for it (straight through, Bengio et al. 2013). k falls level by level, noise on the
scores lets edges change places, and every step sees other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.search.attribution.methods import Scores
from pahq_hf.search.attribution.selection import top_edges
from pahq_hf.search.minibatches import Minibatches

_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of all edges, where gradients are averaged
_RANKED = 32  # pairs whose gradients rank edges, where there are so many: half of them at each share
_FIRST, _SECOND = 0.9, 0.99  # how long gradients and their squares are remembered
_SMALLEST = 1e-5  # added to the root of squares
_FALLS = 0.6  # k reaches its level after so much of it


@dataclass(frozen=True)
class Schedule:
    """How scores are learned.

    Attributes:
        levels: k at the end of each level, falling; none where nothing is learned.
        first: k at the beginning.
        steps: Of a level; the first has twice as many.
        rate: How far scores move in a step.
        noise: Scale of the noise at the beginning of a level; it falls to nothing within it.
        seed: Of the noise.
    """

    levels: tuple[int, ...]
    first: int
    steps: int
    rate: float
    noise: float
    seed: int

    @classmethod
    def towards(cls, edges: int, graph: Graph, steps: int, rate: float, noise: float, seed: int) -> Schedule:
        """The levels down to a size, each half of the one before, from 2,000 edges or half of the graph.

        Args:
            edges: The size.
            graph: The graph.
            steps: Of a level.
            rate: How far scores move in a step.
            noise: Its scale.
            seed: Of the noise.
        """
        first = max(edges, min(2000, graph.edge_count // 2))
        count = max(1, math.ceil(math.log2(first / edges)))
        levels = tuple(min(first, edges * 2**k) for k in reversed(range(count)))
        return cls(levels, first, steps, rate, noise, seed)

    def steps_of(self, level: int) -> int:
        """Steps of a level."""
        return self.steps * (2 if level == 0 else 1)

    @property
    def total(self) -> int:
        """Of all levels."""
        return sum(map(self.steps_of, range(len(self.levels))))

    def size(self, level: int, done: float) -> int:
        """How many edges are chosen in a level of which so much is done. [0, 1]"""
        before = self.levels[level - 1] if level else self.first
        share = min(1.0, done / _FALLS)
        return round(before ** (1 - share) * self.levels[level] ** share)


@dataclass(frozen=True, eq=False)
class Learned:
    """Scores of edges after some levels, and what the next steps need.

    Attributes:
        level: Levels that are done.
        scores: Higher is better; -inf where there is no edge. [readers, writers]
        mean: Of gradients, moving. [readers, writers]
        square: Of their squares. [readers, writers]
        start: The circuit that exact tests start from. [readers, writers]
    """

    level: int
    scores: Scores
    mean: Scores
    square: Scores
    start: BoolArray

    @classmethod
    def nothing(cls, graph: Graph) -> Learned:
        """Where no level is learned: tests start from all edges."""
        edges = graph.all_edges
        none = np.zeros(edges.shape)
        return cls(0, np.where(edges, none, -np.inf), none, none, edges.copy())

    def check(self, graph: Graph) -> None:
        """Check that it can be of a graph.

        Raises:
            ValueError: If not.
        """
        arrays = (self.scores, self.mean, self.square, self.start)
        if any(array.shape != graph.all_edges.shape for array in arrays) or self.start.dtype != np.bool_:
            raise ValueError("its scores are not those of the graph")


class Learner:
    """Learns scores of edges.

    Args:
        graph: The graph.
        batches: Prompt pairs of the steps, one after the other and again from the first.
        schedule: How.
    """

    def __init__(self, graph: Graph, batches: Minibatches, schedule: Schedule) -> None:
        self._graph = graph
        self._batches = batches
        self._schedule = schedule

    def start(self) -> Learned:
        """Scores to start from: logarithms of gradients averaged along the mask, in standard deviations."""
        ranking = np.abs(self.ranking())
        edges = self._graph.all_edges
        logs = np.log(np.maximum(ranking, 1e-30))
        spread = float(logs[edges].std()) or 1.0
        scores = np.where(edges, ((logs - logs[edges].mean()) / spread).clip(-4, 6), -np.inf)
        return Learned(0, scores, np.zeros(edges.shape), np.zeros(edges.shape), edges.copy())

    def ranking(self) -> Scores:
        """What removing each edge adds to the metric, averaged over circuits with a share of every edge.

        Returns:
            [readers, writers]
        """
        sums = np.zeros((len(_SHARES), *self._graph.all_edges.shape))
        pairs = np.zeros(len(_SHARES))
        for number in range(len(self._batches)):
            batch = self._batches[number]
            # Each second share on each second batch: prompts differ less than shares do.
            some = range(len(_SHARES)) if len(self._batches) == 1 else range(number % 2, len(_SHARES), 2)
            for k in some:
                shares = np.where(self._graph.all_edges, _SHARES[k], 0.0)
                sums[k] += batch.pairs * batch.at_circuit(shares)[1]
                pairs[k] += batch.pairs
            if number and pairs.min() >= _RANKED // 2:
                break
        ranking: Scores = (sums / pairs[:, None, None]).mean(axis=0)
        return ranking

    def learn(self, learned: Learned, on_step: Callable[[int, float], None]) -> Learned:
        """Learn one level.

        Args:
            learned: What the levels before it came to.
            on_step: Told k and the gap after every step.
        """
        schedule, level = self._schedule, learned.level
        scores, mean, square = learned.scores.copy(), learned.mean, learned.square
        before = sum(map(schedule.steps_of, range(level)))
        steps = schedule.steps_of(level)
        for number in range(steps):
            step = before + number
            drawn = np.random.default_rng([schedule.seed, step]).gumbel(size=scores.shape)
            noisy = scores + schedule.noise * (1 - number / steps) * drawn
            size = schedule.size(level, (number + 1) / steps)
            circuit = best(self._graph, noisy, size).astype(float)
            gap, effects = self._batches[step % len(self._batches)].at_circuit(circuit)
            gradient = -math.copysign(1.0, gap) * effects  # of the gap, in every edge's share
            mean = _FIRST * mean + (1 - _FIRST) * gradient
            square = _SECOND * square + (1 - _SECOND) * gradient**2
            at = mean / (1 - _FIRST ** (step + 1))
            scores -= schedule.rate * at / (np.sqrt(square / (1 - _SECOND ** (step + 1))) + _SMALLEST)
            on_step(size, abs(gap))
        return Learned(level + 1, scores, mean, square, learned.start)


def best(graph: Graph, scores: Scores, size: int) -> BoolArray:
    """The best edges. [readers, writers]"""
    return top_edges(graph, scores, size, absolute=False)
