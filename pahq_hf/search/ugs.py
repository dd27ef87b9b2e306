"""`ugs`: uniform gradient sampling of masks over all edges (Li and Janson 2024, arXiv 2409.09951).

An edge is in the circuit with probability p. Its mask is 1 or 0, but with probability p (1 - p) it is drawn
uniformly between them. The derivative of the expected metric in p is that of the metric in the mask, averaged
over such masks: every pair of a step is run under several, each drawn by itself. What is brought down is the
gap `|m - m(full)|`, and a penalty for each edge times its p.

Here removed edges carry what the ablation says, corrupted activations by default, where the paper's own
optimises constants; its small penalty on nodes is left out. Numbers are of its code, for this ablation.
"""

from __future__ import annotations

import math

import numpy as np

from pahq_hf.circuit.graph import Graph
from pahq_hf.search.kind import Found
from pahq_hf.search.mask_options import UGSOptions
from pahq_hf.search.masks import Adam, Floats, learn_masks, spread
from pahq_hf.search.minibatches import Minibatch
from pahq_hf.search.work import Work

_START = 1.0  # logit of every probability


class UniformGradients:
    """Masks whose gradient is sampled where they are uniform; its parameters are logits of probabilities.

    Args:
        graph: The graph.
        options: What is asked for.
    """

    adam = Adam(second=0.995, clip=5.0)

    def __init__(self, graph: Graph, options: UGSOptions) -> None:
        self._graph = graph
        self._options = options

    @property
    def samples(self) -> int:
        """Masks that are drawn for each pair of a step."""
        return self._options.samples

    def start(self) -> Floats:
        """Equal logits."""
        return np.full(self._graph.edge_count, _START)

    def rate(self, step: int) -> float:
        """The rate is the same in every step."""
        return self._options.rate

    def drawn(self, probabilities: Floats, step: int, count: int) -> Floats:
        """Masks of some pairs.

        Args:
            probabilities: Of the edges. [edges]
            step: The same draws the same.
            count: How many.

        Returns:
            [count, edges]
        """
        uniform = np.random.default_rng([self._options.seed, step]).random((count, len(probabilities)))
        window = np.maximum(probabilities * (1 - probabilities), 1e-300)
        masks: Floats = ((probabilities - uniform) / window + 0.5).clip(0, 1)
        return masks

    def gradient(self, parameters: Floats, step: int, batch: Minibatch) -> tuple[float, Floats]:
        """The gap under the step's masks, and the way that parameters go (`Method.gradient`)."""
        probabilities = _sigmoid(parameters)
        masks = self.drawn(probabilities, step, batch.pairs)
        gap, effects = batch.at_circuits(spread(self._graph, masks))
        of_gap = -math.copysign(1.0, gap) * effects[:, self._graph.all_edges]
        uniform = (masks > 0) & (masks < 1)
        # Each pair's effects are its part of the mean over all.
        weight = len(masks) / np.maximum(uniform.sum(0), 1)
        sampled = weight * np.where(uniform, of_gap, 0.0).sum(0)
        return abs(gap), (sampled + self._options.penalty) * probabilities * (1 - probabilities)

    def shares(self, parameters: Floats) -> Floats:
        """Probabilities of the edges. [edges]"""
        return _sigmoid(parameters)


def ugs(work: Work[UGSOptions]) -> Found:
    """Find a circuit by uniform gradient sampling (`masks.learn_masks`).

    Args:
        work: The search.
    """
    return learn_masks(work, UniformGradients)


def _sigmoid(values: Floats) -> Floats:
    found: Floats = 0.5 * (1 + np.tanh(0.5 * values))
    return found
