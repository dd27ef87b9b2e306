"""Attribution methods of other papers against their definitions, by finite differences in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pahq_hf import PAHQModel, Task
from pahq_hf.capture.recording import answer_logits
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.engine.hooks import gradient_runs
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.hooks.gradient_runs import Runs
from pahq_hf.engine.hooks.patched_run import PatchedRun
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.errors import MetricError
from pahq_hf.modeling.hooks import hooks
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.search.attribution.methods import (
    check_gradient,
    clean_corrupted,
    eap,
    eap_ig,
    eap_ig_activations,
    passes_over_activations,
)
from tests.families import ALL_FAMILIES
from tests.helpers import ALL_GRAPHS, FP32, wrapped
from tests.models import random_task
from tests.tiers import quick

pytestmark = pytest.mark.crossing

TASK = random_task(batch=3, padding="left", seed=5, rows=2)
NAMES = [
    *("gpt2", "llama", "llama_split", "gpt_neox", "gemma2", "olmo2", "falcon", "qwen3"),
    *("bloom", "granite", "stablelm"),
]
COARSE = {"gemma2": 1e-4}  # its own code computes in float32 now and then


@cache
def float64(name: str) -> PatchedModel:
    if name in ALL_GRAPHS:
        return wrapped(name, dtype=torch.float64).patched
    return PAHQModel(ALL_FAMILIES[name](dtype=torch.float64), FP32).patched


def runs_of(model: PatchedModel, metric: Any, ablation: Any = "corrupted", task: Task = TASK) -> Runs:
    return Runs(model, task, metric, ablation, RegimeRule())


# -- the referee: runs whose readers read more than is written ----------------------------------------------


class Pushed(PatchedRun):
    """A run in which edges carry some share of `c_w - a_w` on top of what they carry."""

    changes: Tensor  # c_w - a_w. [writers, batch, pos, d_model]
    shares: np.ndarray  # [readers, writers]

    def _streams(self, readers: range, stream: Tensor, ablated: Tensor) -> Tensor | None:
        shares = torch.from_numpy(self.shares[readers.start : readers.stop]).to(self.changes)
        return stream + torch.einsum("rw,wbpd->rbpd", shares, self.changes)


class Referee:
    """Metrics of such runs, and their derivatives."""

    def __init__(self, source: Runs) -> None:
        self.source, self.model, self.graph = source, source.model, source.graph
        shape = len(self.graph.writers), *source.clean.embedding.shape
        self.changes = source.clean.embedding.new_zeros(shape)
        self.metric(TASK.clean_ids, np.zeros(self.graph.all_edges.shape))  # which notes down a_w - c_w
        self.changes = -self._room

    def metric(self, ids: Tensor, shares: np.ndarray) -> float:
        self._room = torch.zeros_like(self.changes)
        run = Pushed(self.model, self.source.substitute, self.graph.no_edges(), self._room)
        run.changes, run.shares = self.changes, shares
        with hooks(*run.register()):
            logits = answer_logits(self.model, TASK, ids)
        return self.source.metric(logits)

    def slope(self, ids: Tensor, shares: np.ndarray, edge: tuple[int, int], step: float = 1e-4) -> float:
        """How the metric moves as one edge carries more."""
        ends = []
        for way in (step, -step):
            more = shares.copy()
            more[edge] += way
            ends.append(self.metric(ids, more))
        return (ends[0] - ends[1]) / (2 * step)


def nothing(graph: Graph) -> np.ndarray:
    return np.zeros(graph.all_edges.shape)


def some_edges(graph: Graph, count: int) -> list[tuple[int, int]]:
    """Edges spread over all kinds of readers, those into the same reader far apart."""
    edges = np.argwhere(graph.all_edges)
    return [(int(r), int(w)) for r, w in edges[np.linspace(0, len(edges) - 1, count).astype(int)]]


def only_edges(scores: np.ndarray, edges: BoolArray) -> bool:
    return not scores[~edges].any() and bool(scores.any())


# -- clean-corrupted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "ablation"), [("logit_diff", "corrupted"), ("kl", "zero")])
@pytest.mark.parametrize("name", quick(NAMES, "llama", "gemma2"))
def test_clean_corrupted_is_the_mean_of_two_derivatives(name: str, metric: Any, ablation: Any) -> None:
    source = runs_of(float64(name), metric, ablation)
    scores, graph, referee = clean_corrupted(source), source.graph, Referee(source)
    assert only_edges(scores, graph.all_edges)
    scale = np.abs(scores).max()
    for edge in some_edges(graph, 10):
        slopes = [referee.slope(ids, nothing(graph), edge) for ids in (TASK.clean_ids, TASK.corrupted_ids)]
        assert abs(scores[edge] - sum(slopes) / 2) < COARSE.get(name, 1e-6) * scale, edge


def test_clean_corrupted_has_the_ends_of_the_path_of_eap_ig() -> None:
    source = runs_of(float64("gpt2"), "nll")
    np.testing.assert_allclose(clean_corrupted(source), (eap(source) + eap_ig(source, 1)) / 2, atol=1e-12)


# -- eap-ig-activations ------------------------------------------------------------------------------------


def together(graph: Graph, writer: int) -> list[int]:
    """Writers on the same path: all heads of a layer, or one writer."""
    node = graph.writers[writer]
    if node.head is None:
        return [writer]
    return [
        w for w, other in enumerate(graph.writers) if other.head is not None and other.layer == node.layer
    ]


@pytest.mark.parametrize(("metric", "ablation"), [("logit_diff", "corrupted"), ("kl", "mean")])
@pytest.mark.parametrize("name", quick(NAMES, "llama", "gemma2", "falcon"))
def test_eap_ig_activations_is_the_mean_of_derivatives_along_its_writers_path(
    name: str, metric: Any, ablation: Any
) -> None:
    steps = 3
    source = runs_of(float64(name), metric, ablation)
    scores, graph, referee = eap_ig_activations(source, steps), source.graph, Referee(source)
    assert only_edges(scores, graph.all_edges)
    scale = np.abs(scores).max()
    for edge in some_edges(graph, 10):
        slopes = []
        for k in range(steps):
            path = nothing(graph)
            path[:, together(graph, edge[1])] = 1 - k / steps
            slopes.append(referee.slope(TASK.clean_ids, path * graph.all_edges, edge))
        assert abs(scores[edge] - sum(slopes) / steps) < COARSE.get(name, 1e-6) * scale, edge


@pytest.mark.parametrize("name", quick(["gpt2", "llama", "gpt_neox", "olmo2"], "llama"))
def test_eap_ig_activations_is_complete(name: str) -> None:
    """With many steps the edges out of a block of writers add up to what removing them together does."""
    source = runs_of(float64(name), "kl")
    graph = source.graph
    coarse, fine = (eap_ig_activations(source, steps).sum(axis=0) for steps in (20, 40))
    judge = HooksEngine(source.model, TASK, "kl")
    for writer in range(0, len(graph.writers), 2):
        block = together(graph, writer)
        kept = graph.all_edges.copy()
        kept[:, block] = False
        effect = judge.metric_of(kept)  # kl of the full model is 0
        assert abs(2 * fine[block].sum() - coarse[block].sum() - effect) < 1e-2 * max(abs(effect), 0.05)


def test_eap_ig_activations_of_parts_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    source = runs_of(float64("llama"), "nll")
    whole = eap_ig_activations(source, 2)
    monkeypatch.setattr(gradient_runs, "_BACKWARD_BYTES", 1)  # one example at a time
    monkeypatch.setattr(gradient_runs, "_DIFFERENCE_BYTES", 1)  # and one token
    np.testing.assert_allclose(eap_ig_activations(source, 2), whole, rtol=1e-9, atol=1e-13)


def test_progress_counts_every_gradient() -> None:
    source = runs_of(float64("gpt2"), "nll")
    done: list[int] = []
    eap_ig_activations(source, 2, done.append)
    assert sum(done) == passes_over_activations(source.graph, 2) * len(TASK) == 2 * 5 * len(TASK)


# -- what a metric has to have -----------------------------------------------------------------------------


def test_kl_has_a_gradient_at_the_corrupted_run() -> None:
    check_gradient("clean-corrupted", "kl")
    with pytest.raises(MetricError, match="kl"):
        check_gradient("eap", "kl")
