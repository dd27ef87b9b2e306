"""Scores of all edges by attribution (docs/semantics.md, section 7).

Scores are float64 [readers, writers], 0 where there is no edge. A positive score says that removing the edge
raises the minimised metric: the edge matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahq_hf.circuit.graph import Graph
from pahq_hf.engine.backward_rules import DERIVATIVE, GIM, BackwardRules
from pahq_hf.engine.protocol import Engine, GradientRuns, Gradients, Part
from pahq_hf.errors import MetricError
from pahq_hf.precision.sums import add_rows
from pahq_hf.search.attribution.kinds import check_gradient

Scores = NDArray[np.float64]

Done = Callable[[int], None]
_CANDIDATES = 64  # edges removed side by side


def _nobody(_: int) -> None:
    """Nobody counts."""


def eap(runs: GradientRuns, on_done: Done = _nobody) -> Scores:
    """Edge attribution patching (Syed et al. 2023): `Σ (c_u - a_u) · ∂L/∂input_v` at the clean run.

    Args:
        runs: The task's runs.
        on_done: Called with the number of prompts a gradient was taken of, each time.

    Returns:
        [readers, writers]

    Raises:
        MetricError: If the metric's gradient is zero there, as of `kl`.
    """
    check_gradient("eap", runs.metric.name)
    return _at_the_clean_run(runs, DERIVATIVE, on_done)


def gim(runs: GradientRuns, on_done: Done = _nobody) -> Scores:
    """EAP with the backward rules of Gradient Interaction Modifications (Edin et al. 2025, arXiv 2505.17630).

    Three rules against gradients that are small where what counts is large, or counted twice. The forward
    pass is the model's own.

    - Attention's softmax has the Jacobian diag(p) - p p^T of p = softmax(scores / 2), without the factor 1/2
      that a softmax of that temperature would have.
    - The scale of norms is a constant: of those before blocks, after them, of queries and keys, and the last.
    - Where activations are multiplied, each gets a share of the gradient: a half for values, for a gated
      MLP's gate and for what it multiplies; a quarter for queries and for keys.

    Differences from the authors' code (JoakimEdin/gim): the metric is any, not the difference of two logits;
    edges into `logits` carry differences like all others; the rules hold in mixtures of experts as in
    other gated MLPs, and the router's weights have their derivative.

    Args:
        runs: The task's runs.
        on_done: Called with the number of prompts a gradient was taken of, each time.

    Returns:
        [readers, writers]

    Raises:
        MetricError: If the metric's gradient is zero there, as of `kl`.
        UnsupportedModelError: If a norm is of an unknown kind.
    """
    check_gradient("gim", runs.metric.name)
    return _at_the_clean_run(runs, GIM, on_done)


def _at_the_clean_run(runs: GradientRuns, rules: BackwardRules, on_done: Done) -> Scores:
    total = np.zeros(runs.graph.all_edges.shape)
    for part in runs.parts():
        clean = runs.clean.embedding[part.examples]
        _add_edge_scores(total, runs, part, runs.gradients(part, clean, rules))
        on_done(len(part.task))
    return total


def eap_ig(runs: GradientRuns, steps: int, on_done: Done = _nobody) -> Scores:
    """EAP with integrated gradients over the inputs (Hanna et al. 2024).

    The gradient is averaged over runs whose `input` writes `corr + (k/m)(clean - corr)`, k = 0 … m-1.

    Differences from the authors' code (hannamw/EAP-IG): it stepped k = 1 … m before it stepped k = 0 … m-1,
    as here; the metric's sign is its caller's affair, here it is minimised; and it allows corrupted
    activations only, while here the path starts at the corrupted prompts' embeddings whatever the ablation,
    which changes only what removed edges carry. `input` is the whole embedding output, learned positions
    included.

    Args:
        runs: The task's runs.
        steps: m.
        on_done: Called with the number of prompts a gradient was taken of, each time.

    Returns:
        [readers, writers]
    """
    total = np.zeros(runs.graph.all_edges.shape)
    for part in runs.parts():
        start = runs.corrupted.embedding[part.examples]
        whole = runs.clean.embedding[part.examples] - start
        for k in range(steps):
            _add_edge_scores(total, runs, part, runs.gradients(part, start + (k / steps) * whole))
            on_done(len(part.task))
    return total / steps


def eap_ig_activations(runs: GradientRuns, steps: int, on_done: Done = _nobody) -> Scores:
    """EAP with integrated gradients over activations (EAP-IG-activations of MIB and of Hanna et al.'s code).

    A writer's edges have the gradient averaged over runs in which the writer itself writes
    `c_u + (k/m)(a_u - c_u)`, k = 0 … m-1, and all before it is clean. The heads of a layer go together, as in
    the authors' code, so that it takes `passes_over_activations` gradients of each prompt.

    Differences from the authors' code (hannamw/EAP-IG at 62f83cd): there every edge has the mean over the
    paths of *all* writers, where MIB says "at the component that is being attributed", and k = 1 … m; and
    clean activations are recorded with the opposite sign, so that the path does not end at the clean run.

    Args:
        runs: The task's runs.
        steps: m.
        on_done: Called with the number of prompts a gradient was taken of, each time.

    Returns:
        [readers, writers]
    """
    total = np.zeros(runs.graph.all_edges.shape)
    for part in runs.parts():
        for writers in _blocks(runs.graph):
            for k in range(steps):
                gradients = runs.gradients_beside(part, writers, 1 - k / steps)
                _add_edge_scores(total, runs, part, gradients, writers)
                on_done(len(part.task))
    return total / steps


def passes_over_activations(graph: Graph, steps: int) -> int:
    """Gradients that `eap_ig_activations` takes of each prompt."""
    return steps * len(_blocks(graph))


def _blocks(graph: Graph) -> list[range]:
    """Writers that write together: `input`, and the heads and the MLP of each layer."""
    found = []
    for _, block in groupby(range(len(graph.writers)), lambda w: _block_of(graph, w)):
        each = list(block)
        found.append(range(each[0], each[-1] + 1))
    return found


def _block_of(graph: Graph, writer: int) -> tuple[int, bool]:
    return graph.writers[writer].layer, graph.writers[writer].head is None


def clean_corrupted(runs: GradientRuns, on_done: Done = _nobody) -> Scores:
    """EAP with the mean of two gradients, at the clean and at the corrupted run.

    It is the trapezoid rule on the path of `eap_ig`, with its two ends alone. Method `clean-corrupted` of the
    authors' code (hannamw/EAP-IG) and of MIB, which allow corrupted activations only; here the second
    gradient is that at the corrupted prompts' embeddings whatever the ablation, as in `eap_ig`.

    Args:
        runs: The task's runs.
        on_done: Called with the number of prompts a gradient was taken of, each time.

    Returns:
        [readers, writers]
    """
    total = np.zeros(runs.graph.all_edges.shape)
    for part in runs.parts():
        for end in (runs.clean, runs.corrupted):
            _add_edge_scores(total, runs, part, runs.gradients(part, end.embedding[part.examples]))
            on_done(len(part.task))
    return total / 2


def hisp(runs: GradientRuns, on_done: Done = _nobody) -> Scores:
    """Head importance (Michel et al. 2019), with corrupted activations as in the ACDC paper.

    A node's importance is `mean over examples of |Σ (c_u - a_u) · ∂L/∂a_u|`, MLPs and `input` included; it is
    not normalised layer by layer. A threshold on nodes selects the edges between them, so an edge's score is
    the smaller importance of its two ends. A key or value group is as important as its most important head.
    `logits` is always in, so an edge into it is as important as its writer. Scores are never negative.

    Args:
        runs: The task's runs.
        on_done: Called with the number of prompts a gradient was taken of, each time.

    Returns:
        [readers, writers]

    Raises:
        MetricError: If the metric's gradient is zero there, as of `kl`.
    """
    check_gradient("hisp", runs.metric.name)
    importance = np.zeros(len(runs.graph.writers))
    for part in runs.parts():
        per_example = np.zeros((len(runs.graph.writers), len(part.task)))
        gradients = runs.gradients(part, runs.clean.embedding[part.examples])
        _add_node_scores(per_example, runs, part, gradients)
        on_done(len(part.task))
        importance += np.abs(per_example).sum(axis=1)  # the metric is a mean over examples already
    return edges_from_nodes(runs.graph, importance)


def edges_from_nodes(graph: Graph, importance: Scores) -> Scores:
    """Edge scores that select, at any threshold, the edges between the nodes at or above it.

    Args:
        graph: The graph.
        importance: Of every writer. [writers]

    Returns:
        [readers, writers]
    """
    ends = np.array([importance[list(reader.nodes)].max(initial=-np.inf) for reader in graph.readers])
    ends[graph.logits_reader] = np.inf
    scores: Scores = np.where(graph.all_edges, np.minimum(importance[None, :], ends[:, None]), 0.0)
    return scores


def exact(
    engine: Engine,
    on_done: Done = _nobody,
    *,
    known: Mapping[int, Mapping[int, float]] | None = None,
    on_reader: Callable[[int, Mapping[int, float]], None] | None = None,
) -> Scores:
    """What removing each edge alone from the full model does to the metric: `m(full without e) - m(full)`.

    Everything upstream of an edge is the clean run, so the sparse engine computes no more than what the edge
    can change.

    Args:
        engine: Computes metrics.
        on_done: Called with the number of edges that were removed, each time.
        known: Scores of readers that need not be computed again, by reader and writer.
        on_reader: Called with the scores of every other reader when it is finished.

    Returns:
        [readers, writers]
    """
    graph, known = engine.graph, known or {}
    scores = np.zeros(graph.all_edges.shape)
    try:
        full = engine.begin(graph.all_edges.copy())
        for reader in graph.reader_order("head"):  # changes the active component least often
            edges = list(graph.in_edges(reader))
            if not edges:
                continue
            if reader in known:
                scores[reader, edges] = [known[reader][writer] for writer in edges]
                continue
            again = engine.focus(reader)
            full = full if again is None else again
            for start in range(0, len(edges), _CANDIDATES):
                some = edges[start : start + _CANDIDATES]
                values = engine.try_(reader, [[writer] for writer in some]).values
                scores[reader, some] = np.array(values) - full
                on_done(len(some))
            if on_reader is not None:
                on_reader(reader, {writer: float(scores[reader, writer]) for writer in edges})
    finally:
        engine.finish()
    return scores


def random_scores(graph: Graph, seed: int) -> Scores:
    """Scores drawn evenly from [0, 1).

    Args:
        graph: The graph.
        seed: Determines every score.

    Returns:
        [readers, writers]
    """
    drawn = np.random.default_rng(seed).random(graph.all_edges.shape)
    scores: Scores = np.where(graph.all_edges, drawn, 0.0)
    return scores


def mean_of_shares(members: Sequence[Scores]) -> Scores:
    """The mean of several methods' scores, each as a share of all that its method attributes.

    Mondorf et al. 2025 (arXiv 2510.06811) take the mean of scores as they are, of methods whose scores are
    alike in size ("parallel ensemble"). Here each method has its magnitudes' sum as a unit, so that
    those whose scores are of another size, as GIM's are, have the same say.

    Args:
        members: Scores of each method. [readers, writers]

    Returns:
        Between -1 and 1, with a sum of magnitudes of at most 1. [readers, writers]
    """
    shares = [scores / (np.abs(scores).sum() or 1.0) for scores in members]
    mean: Scores = np.mean(shares, axis=0)
    return mean


# -- sums over tokens -------------------------------------------------------------------------------


def _add_edge_scores(
    total: Scores, runs: GradientRuns, part: Part, gradients: Gradients, writers: range | None = None
) -> None:
    """Add a part's `Σ (c_w - a_w) · ∂L/∂input_r` to all edges, or to those of some writers.

    Args:
        total: [readers, writers]
        runs: The task's runs.
        part: The part.
        gradients: Of the part's metric.
        writers: Of one block; all by default.
    """
    first = 0 if writers is None else writers.start
    for tokens, differences in runs.chunks(part, writers):
        changes = differences.flatten(1)
        for readers, gradient in gradients.walk(tokens):
            seen = int(runs.graph.prefix[readers.start]) - first
            if seen <= 0:
                break  # readers come from the output to the input, and none of these sees the writers
            scores = gradient.flatten(1) @ changes[:seen].T
            rows, columns = slice(readers.start, readers.stop), slice(first, first + scores.shape[1])
            total[rows, columns] += scores.double().cpu().numpy()


def _add_node_scores(total: Scores, runs: GradientRuns, part: Part, gradients: Gradients) -> None:
    """Add `Σ (c_w - a_w) · ∂L/∂a_w` of each example of a part to all writers. [writers, examples]

    The gradient of what a writer writes is the sum of those of its readers.
    """
    length = part.task.length
    for tokens, differences in runs.chunks(part):
        example = tokens // length
        reached = differences.new_zeros(differences.shape[1:])  # sum of the readers so far. [tokens, d_model]
        below = len(runs.graph.writers)

        for readers, gradient in gradients.walk(tokens):
            seen = int(runs.graph.prefix[readers.start])
            if seen < below:  # whoever is not seen from here downwards has met all its readers
                total[seen:below] += _by_example(differences[seen:below] * reached, example, total.shape[1])
                below = seen
            reached = reached + gradient.sum(0)
        total[:below] += _by_example(differences[:below] * reached, example, total.shape[1])


def _by_example(products: Tensor, example: Tensor, count: int) -> Scores:
    """Sums over the tokens of each example. [writer, tokens, d_model] -> [writer, examples]"""
    sums = products.new_zeros(count, products.shape[0], dtype=torch.float64)
    return add_rows(sums, example, products.sum(-1).double().t()).t().cpu().numpy()


def check_finite(scores: Scores, method: str) -> Scores:
    """`scores`, unless one is NaN or infinite.

    Raises:
        MetricError: If one is.
    """
    if not np.isfinite(scores).all():
        raise MetricError(f"{method} gives scores that are NaN or infinite on this data; check the prompts")
    return scores
