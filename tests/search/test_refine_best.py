"""`refine` against the best of all circuits of a size, where these can be counted."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.engine.build import make_referee
from tests.models import random_task
from tests.tiers import exhaustive

TASK = random_task(64, batch=12, length=7, padding="right", seed=11, metric="kl")


@cache
def made(heads: int, seed: int) -> PAHQModel:
    """One layer with random weights so large that edges matter: 8 edges with one head, 13 with two."""
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=heads, initializer_range=0.4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
    return PAHQModel(model, PAHQConfig("fp32"))


def best_gaps(model: PAHQModel) -> list[float]:
    """How near circuits come to the full model with at most 0, 1, ... edges, by trying all of them."""
    graph = model.patched.graph
    engine = make_referee(model.patched, TASK, "kl", "corrupted")
    edges, gaps = np.argwhere(graph.all_edges), dict[bytes, tuple[int, float]]()
    for chosen in product((False, True), repeat=len(edges)):
        kept = graph.no_edges()
        kept[tuple(edges[list(chosen)].T)] = True
        live = graph.live_edges(kept)  # dead edges change nothing
        if live.tobytes() not in gaps:
            gaps[live.tobytes()] = int(live.sum()), engine.metric_of(live)
    return [min(gap for size, gap in gaps.values() if size <= k) for k in range(len(edges) + 1)]


@pytest.mark.parametrize(
    ("heads", "seed", "missed"),
    [
        (1, 0, 1),
        (1, 1, 1),
        exhaustive(2, 0, 2),
        exhaustive(2, 1, 4),
        exhaustive(2, 2, 0),
        exhaustive(2, 3, 6),
    ],
)
def test_of_most_sizes_it_finds_the_best_circuit_there_is(heads: int, seed: int, missed: int) -> None:
    """Of the others too it is nearer to the full model than the best edges by EAP-IG."""
    model = made(heads, seed)
    best, far = best_gaps(model), 0
    for size in range(1, len(best) - 1):
        ours = model.discover(TASK, search="refine", edges=size, steps=2, validation=0.0, progress=False)
        gap = ours.record.metric.fp32
        assert gap is not None and ours.edge_count <= size
        assert best[size] - 1e-6 <= gap <= best[0] + 1e-6
        others = model.attribute(TASK, method="eap-ig", topn=size, progress=False).record.metric.fp32
        assert others is not None and gap <= others + 1e-6
        far += gap > best[size] + 1e-4 * best[0]
    print("far", far, len(best))
    assert far <= missed
