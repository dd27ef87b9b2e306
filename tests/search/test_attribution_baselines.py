"""Attribution methods of other papers against their definitions, by finite differences in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pahq_hf import Task
from pahq_hf.capture.recording import answer_logits
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.engine.hooks.gradient_runs import Runs
from pahq_hf.engine.hooks.patched_run import PatchedRun
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.errors import MetricError
from pahq_hf.modeling.hooks import hooks
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.search.attribution.methods import check_gradient, clean_corrupted, eap, eap_ig
from tests.helpers import wrapped
from tests.models import random_task
from tests.tiers import quick

pytestmark = pytest.mark.crossing

TASK = random_task(batch=3, padding="left", seed=5, rows=2)
NAMES = ["gpt2", "llama", "llama_split", "gpt_neox", "gemma2", "olmo2", "falcon", "qwen3"]
COARSE = {"gemma2": 1e-4}  # its own code computes in float32 now and then


def float64(name: str) -> PatchedModel:
    return wrapped(name, dtype=torch.float64).patched


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


# -- what a metric has to have -----------------------------------------------------------------------------


def test_kl_has_a_gradient_at_the_corrupted_run() -> None:
    check_gradient("clean-corrupted", "kl")
    with pytest.raises(MetricError, match="kl"):
        check_gradient("eap", "kl")
