"""`edge-pruning`: hard concrete masks over all edges, as many of them as are asked for.

Bhaskar et al. 2024 (arXiv 2406.16778), after Louizos et al. 2018 (arXiv 1712.01312). The mask of an edge is
a binary concrete variable with location `log alpha`, stretched beyond 0 and 1 and cut there, so that it is
exactly 0 or 1 with some probability and has a gradient between. One mask is drawn for all pairs of a step.
What is brought down is

    |m - m(full)| + l1 (s - t) + l2 (s - t)^2

of the sparsity s of the mask, one minus its mean, and a target t that rises from 0 to the sparsity that is
asked for within five sixths of the steps. The multipliers l1 and l2 are learned too: they go up this slope.

Here only edges have masks; the authors' code masks what nodes write as well. Numbers are theirs, of IOI on
GPT-2.
"""

from __future__ import annotations

import math

import numpy as np

from pahq_hf.circuit.graph import Graph
from pahq_hf.search.kind import Found
from pahq_hf.search.mask_options import EdgePruningOptions
from pahq_hf.search.masks import Adam, Floats, learn_masks, spread
from pahq_hf.search.minibatches import Minibatch
from pahq_hf.search.work import Work

_LOW, _HIGH = -0.1, 1.1  # ends of the stretched variable
_TEMPERATURE = 2 / 3
_MARGIN = 1e-6  # uniform draws keep so far from 0 and 1
_START, _SPREAD = 10.0, 0.01  # mean and standard deviation of log alphas
_RISES = 5 / 6  # of all steps, in which the target rises
_WARMS = 1 / 15  # and in which the rate does


class HardConcrete:
    """Hard concrete masks whose sparsity follows a target.

    Its parameters are log alphas, and behind them the two multipliers.

    Args:
        graph: The graph.
        options: What is asked for.
    """

    adam = Adam(second=0.999, clip=1.0, decay=0.01)
    samples = 1

    def __init__(self, graph: Graph, options: EdgePruningOptions) -> None:
        self._graph = graph
        self._options = options

    def start(self) -> Floats:
        """Log alphas of masks that are all but surely 1, and no penalty."""
        options, edges = self._options, self._graph.edge_count
        drawn = np.random.default_rng([options.seed, options.steps])  # no step has that number
        return np.concatenate([drawn.normal(_START, _SPREAD, edges), [0.0, 0.0]])

    def rate(self, step: int) -> float:
        """The rate rises, then falls to nothing."""
        steps, warm = self._options.steps, round(_WARMS * self._options.steps)
        share = (step + 1) / warm if step < warm else (steps - step) / (steps - warm)
        return self._options.rate * share

    def target(self, step: int) -> float:
        """Sparsity that is asked for in a step."""
        assert self._options.edges is not None
        whole = 1 - self._options.edges / self._graph.edge_count
        return whole * min(1.0, step / max(1, round(_RISES * self._options.steps)))

    def drawn(self, log_alphas: Floats, step: int) -> tuple[Floats, Floats]:
        """A mask, and its derivative in every log alpha.

        Args:
            log_alphas: [edges]
            step: The same draws the same.

        Returns:
            Two of [edges].
        """
        uniform = np.random.default_rng([self._options.seed, step]).uniform(
            _MARGIN, 1 - _MARGIN, log_alphas.shape
        )
        logits = (np.log(uniform) - np.log1p(-uniform) + log_alphas) / _TEMPERATURE
        concrete = 0.5 * (1 + np.tanh(0.5 * logits))
        stretched = (_HIGH - _LOW) * concrete + _LOW
        slope = (_HIGH - _LOW) * concrete * (1 - concrete) / _TEMPERATURE
        inside = (stretched > 0) & (stretched < 1)
        return stretched.clip(0, 1), np.where(inside, slope, 0.0)

    def gradient(self, parameters: Floats, step: int, batch: Minibatch) -> tuple[float, Floats]:
        """The gap under the step's mask, and the way that parameters go (`Method.gradient`)."""
        log_alphas, (linear, squared) = parameters[:-2], parameters[-2:]
        masks, slopes = self.drawn(log_alphas, step)
        gap, effects = batch.at_circuit(spread(self._graph, masks))
        of_gap = -math.copysign(1.0, gap) * effects[self._graph.all_edges]
        missed = 1 - float(masks.mean()) - self.target(step)
        of_sparsity = -(linear + 2 * squared * missed) / len(masks)
        gradient = (of_gap + of_sparsity) * slopes
        return abs(gap), np.concatenate([gradient, [-missed, -(missed**2)]])

    def shares(self, parameters: Floats) -> Floats:
        """How often the mask of each edge is not 0. [edges]"""
        logits = parameters[:-2] - _TEMPERATURE * math.log(-_LOW / _HIGH)
        found: Floats = 0.5 * (1 + np.tanh(0.5 * logits))
        return found


def edge_pruning(work: Work[EdgePruningOptions]) -> Found:
    """Find a circuit by hard concrete masks (`masks.learn_masks`).

    Args:
        work: The search.
    """
    return learn_masks(work, HardConcrete)
