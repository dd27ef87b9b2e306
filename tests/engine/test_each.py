"""What each edge is worth alone, removed from a circuit or added to it: against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from tests.engine.soft_circuits import SoftReferee
from tests.engine.test_slopes import TASKS, close, engine_of
from tests.helpers import ALL_GRAPHS, referee, wrapped
from tests.tiers import quick

pytestmark = pytest.mark.crossing

KINDS = ("hooks", "sparse")
NAMES = quick(ALL_GRAPHS, "gpt2", "llama_split", "gemma2", "olmo2", "falcon", "gpt_neox")


def a_circuit(graph: Graph, share: float, seed: int) -> BoolArray:
    """Random edges, dead ones among them. [readers, writers]"""
    drawn = np.random.default_rng(seed).random(graph.all_edges.shape) < share
    return graph.all_edges & drawn


@pytest.mark.parametrize(
    ("metric", "ablation", "padding", "share"),
    [("kl", "corrupted", "left", 0.3), ("logit_diff", "mean", "right", 0.1), ("nll", "zero", "none", 0.7)],
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_those_of_brute_force(
    kind: str, name: str, metric: str, ablation: Any, padding: str, share: float
) -> None:
    task = TASKS[padding]
    engine = engine_of(kind, wrapped(name, dtype=torch.float64), metric, task, ablation)
    graph = engine.graph
    judge = SoftReferee(referee(name, task, metric=metric, ablation=ablation), graph)
    kept = a_circuit(graph, share, seed=5)
    chosen = np.random.default_rng(6).random(kept.shape) < 0.4
    present, absent = kept & chosen, graph.all_edges & ~kept & chosen

    def alone(edge: tuple[int, int]) -> float:
        other = kept.copy()
        other[edge] = not kept[edge]
        return judge(np.where(other, 1.0, 0.0)) - judge(np.where(kept, 1.0, 0.0))

    added, dropped = engine.add_each(kept, absent), engine.drop_each(kept)
    for effects, edges in ((added, absent), (dropped, present)):
        expected = np.array([alone(edge) for edge in edge_list(edges)])
        assert np.abs(expected).max() > 1e-4
        close(effects[edges], expected, 1e-6)
    assert not added[~absent].any() and not dropped[~kept].any()
    some = engine.drop_each(kept, present)
    close(some[present], dropped[present], 1e-9)
    assert not some[~present].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_edge_from_nowhere_and_one_to_nowhere_add_nothing(kind: str) -> None:
    """But for rounding: its writer writes what stands in for it, or nothing reads its reader's node."""
    engine = engine_of(kind, wrapped("llama"), "kl")
    graph = engine.graph
    kept = graph.live_edges(a_circuit(graph, 0.3, seed=1))
    absent = graph.all_edges & ~kept
    effects = engine.add_each(kept, absent)
    for edge in edge_list(absent):
        more = kept.copy()
        more[edge] = True
        if not graph.live_edges(more)[edge]:
            assert effects[edge] == pytest.approx(0, abs=1e-6)
    assert np.abs(effects).max() > 1e-4


@pytest.mark.parametrize("regime", ["pahq", "rtn", "pahq-literal"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_low_precision_they_are_differences_of_circuits(kind: str, regime: Any) -> None:
    engine = engine_of(kind, wrapped("gpt2", regime=regime), "logit_diff")
    graph = engine.graph
    kept = a_circuit(graph, 0.3, seed=2)
    absent = graph.all_edges & ~kept & (np.random.default_rng(3).random(kept.shape) < 0.2)
    effects = engine.add_each(kept, absent)
    before = engine.metric_of(kept)
    expected = []
    for edge in edge_list(absent):
        more = kept.copy()
        more[edge] = True
        expected.append(engine.metric_of(more) - before)
    close(
        effects[absent], np.array(expected), 1e-6 if kind == "hooks" else 0.1
    )  # low products of what each changes
