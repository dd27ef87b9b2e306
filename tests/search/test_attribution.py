"""Attribution scores against their definitions: derivatives, path integrals, edges removed one by one."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pahq_hf import PAHQConfig, PAHQModel, Task
from pahq_hf.capture.recording import answer_logits
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.engine.hooks import gradient_runs as runs
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.hooks.gradient_runs import Runs
from pahq_hf.engine.hooks.patched_run import PatchedRun
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import ConfigError, MetricError
from pahq_hf.modeling.hooks import hooks
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.products import Product
from pahq_hf.search.attribution import methods
from pahq_hf.search.attribution.methods import eap, eap_ig, edges_from_nodes, exact, hisp, random_scores
from pahq_hf.search.attribution.selection import edges_from, top_edges
from tests.families import ALL_FAMILIES, IN_FLOAT64, LIKE_OTHERS
from tests.helpers import FP32, wrapped
from tests.models import FAMILIES, random_task, tiny_gpt2
from tests.tiers import examples, quick

pytestmark = pytest.mark.crossing

TASK = random_task(batch=3, padding="left", seed=5, rows=2)
NAMES = [
    *("gpt2", "llama", "llama_split", "gpt_neox", "gemma2", "gemma2_split", "olmo2", "olmo2_split"),
    *("falcon", "falcon_split", "qwen3"),
]
# Families whose own code computes in float32 now and then, whatever the model's dtype.
COARSE = {"gemma2": 1e-4, "gemma2_split": 1e-4}


def float64(name: str) -> PatchedModel:
    return wrapped(name, dtype=torch.float64).patched


def runs_of(model: PatchedModel, metric: Any, ablation: Any = "corrupted", task: Task = TASK) -> Runs:
    return Runs(model, task, metric, ablation, RegimeRule())


# -- derivatives: an edge carries a_u + t (c_u - a_u) ------------------------------------------------------


class PartlyRemoved(PatchedRun):
    """A run in which some edges carry `a_u + t (c_u - a_u)`, by the hooks engine's own machinery."""

    edges: np.ndarray  # [readers, writers]
    t: float

    def _streams(self, readers: range, stream: Tensor, ablated: Tensor) -> Tensor | None:
        streams = stream.expand(len(readers), *stream.shape).clone()
        for number, reader in enumerate(readers):
            for writer in np.flatnonzero(self.edges[reader]):
                streams[number] -= self.t * self._differences[writer]  # which are a - c
        return streams


def metric_by_example(source: Runs, edges: np.ndarray, t: float, task: Task = TASK) -> np.ndarray:
    """Each example's share of the metric when some edges are partly removed. [examples]"""
    model = source.model
    buffer = source.clean.embedding.new_zeros(len(model.graph.writers), *source.clean.embedding.shape)
    run = PartlyRemoved(model, source.substitute, model.graph.no_edges(), buffer)
    run.edges, run.t = edges, t
    with hooks(*run.register()):
        logits = answer_logits(model, task, task.clean_ids)
    rows = source.metric.rows(logits) * source.metric.row_weights
    return np.bincount(task.answer_rows.numpy(), rows.numpy(), minlength=len(task))


def derivative(source: Runs, edges: np.ndarray, step: float = 1e-4) -> np.ndarray:
    after, before = (metric_by_example(source, edges, t) for t in (step, -step))
    return (after - before) / (2 * step)


def some_edges(graph: Graph, count: int) -> list[tuple[int, int]]:
    """Edges spread over all kinds of readers, those into the same reader far apart."""
    edges = np.argwhere(graph.all_edges)
    return [(int(r), int(w)) for r, w in edges[np.linspace(0, len(edges) - 1, count).astype(int)]]


@pytest.mark.parametrize(
    ("metric", "ablation"), [("logit_diff", "corrupted"), ("prob_diff", "zero"), ("nll", "mean")]
)
@pytest.mark.parametrize("name", NAMES)
def test_eap_is_the_derivative_along_the_edge(name: str, metric: Any, ablation: Any) -> None:
    source = runs_of(float64(name), metric, ablation)
    scores, graph = eap(source), source.graph
    assert np.array_equal(scores != 0, scores * graph.all_edges != 0)
    scale = np.abs(scores).max()
    for reader, writer in some_edges(graph, 14):
        alone = graph.no_edges()
        alone[reader, writer] = True
        slope = derivative(source, alone).sum()
        assert abs(scores[reader, writer] - slope) < COARSE.get(name, 1e-6) * scale, (reader, writer)


GRADED = sorted(set(IN_FLOAT64) - {"gptj"})


@pytest.mark.parametrize("family", quick(GRADED, *(set(GRADED) - LIKE_OTHERS)))
def test_every_family_has_gradients(family: str) -> None:
    """The edges out of `input` together are the derivative along the embedding."""
    model = PAHQModel(ALL_FAMILIES[family](dtype=torch.float64), FP32).patched
    source = runs_of(model, "logit_diff")
    scores = eap(source)
    out_of_input = source.graph.no_edges()
    out_of_input[:, 0] = True
    # Parts of them are float32.
    rounds = "moe" in family or family in ("mixtral", "cohere", "cohere_qk", "cohere2", "ernie4_5")
    slope = derivative(source, out_of_input, 1e-3 if rounds else 1e-6).sum()
    assert abs(scores[:, 0].sum() - slope) < 1e-3 * np.abs(scores).max()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "olmo2"])
def test_hisp_is_each_nodes_derivative(name: str) -> None:
    source = runs_of(float64(name), "logit_diff")
    graph = source.graph
    scores = hisp(source)
    importance = scores[graph.logits_reader]  # `logits` is always in
    for writer in range(len(graph.writers)):
        edges = graph.no_edges()
        edges[:, writer] = graph.all_edges[:, writer]
        expected = np.abs(derivative(source, edges)).sum()
        assert importance[writer] == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert np.array_equal(scores, edges_from_nodes(graph, importance))


def test_the_scores_of_a_part_do_not_depend_on_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    source = runs_of(float64("llama"), "nll")
    whole = eap(source), hisp(source), eap_ig(source, 3)
    monkeypatch.setattr(runs, "_BACKWARD_BYTES", 1)  # one example at a time
    monkeypatch.setattr(runs, "_DIFFERENCE_BYTES", 1)  # and one token
    assert len(list(source.parts())) == len(TASK)
    for one, other in zip(whole, (eap(source), hisp(source), eap_ig(source, 3)), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-10, atol=1e-14)


def test_split_groups_share_what_a_native_group_reads() -> None:
    """Values of a group are read by its heads: their scores add up to the group's."""
    native, split = (eap(runs_of(float64(name), "logit_diff")) for name in ("llama", "llama_split"))
    graph, finer = (float64(name).graph for name in ("llama", "llama_split"))
    for layer in range(graph.spec.layers):
        for kind in ("k", "v"):
            for group, reader in enumerate(graph.layer_readers(layer, kind)):  # type: ignore[arg-type]
                heads = [finer.layer_readers(layer, kind)[h] for h in graph.heads_of_kv(group)]  # type: ignore[arg-type]
                np.testing.assert_allclose(split[heads].sum(0), native[reader], atol=1e-12)


# -- linear paths ------------------------------------------------------------------------------------------


@cache
def without_norms() -> PatchedModel:
    """A GPT-2 whose last layer's values and whose output are read without norms."""
    hf = tiny_gpt2(dtype=torch.float64)
    hf.transformer.ln_f = nn.Identity()
    hf.transformer.h[-1].ln_1 = nn.Identity()
    hf.transformer.h[-1].mlp.c_proj.weight.data.zero_()  # nothing but the direct path follows the heads
    return PAHQModel(hf, FP32).patched


def test_eap_is_the_exact_effect_on_linear_paths() -> None:
    model = without_norms()
    graph = model.graph
    scores = eap(runs_of(model, "logit_diff"))
    effects = exact(SparseEngine(model, TASK, "logit_diff"))
    last = graph.spec.layers - 1
    linear = [graph.logits_reader, *graph.layer_readers(last, "v")]
    np.testing.assert_allclose(scores[linear], effects[linear], atol=1e-12)
    assert np.abs(scores[linear]).max() > 0.1
    bent = list(graph.layer_readers(last, "q"))  # a softmax is not linear
    assert np.abs(scores[bent] - effects[bent]).max() > 1e-3


def test_eap_ig_is_eap_where_the_gradient_is_constant() -> None:
    model = without_norms()
    source = runs_of(model, "logit_diff")
    logits = model.graph.logits_reader
    np.testing.assert_allclose(eap_ig(source, 4)[logits], eap(source)[logits], atol=1e-12)


# -- integrated gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize(
    "name", quick(["gpt2", "llama_split", "gpt_neox", "gemma2"], "llama_split", "gemma2")
)
def test_eap_ig_is_complete(name: str, metric: Any) -> None:
    """With many steps the edges out of `input` add up to what corrupting the prompts does.

    The path's sum runs from the left, so its error halves when the steps double, and twice the finer sum less
    the coarser one is nearly the integral.
    """
    source = runs_of(float64(name), metric)
    effect = source.metric(source.corrupted.logits) - source.metric(source.clean.logits)
    coarse, fine = (eap_ig(source, steps)[:, 0].sum() for steps in (64, 128))
    assert abs(2 * fine - coarse - effect) < 1e-2 * max(abs(effect), 0.1)
    assert abs(fine - effect) < abs(coarse - effect) < 0.2 * max(abs(effect), 1)


@pytest.mark.parametrize("ablation", ["corrupted", "zero"])
def test_one_step_is_the_gradient_of_the_corrupted_run(ablation: Any) -> None:
    model = float64("llama")
    swapped = Task(
        **vars(TASK) | {"clean_ids": TASK.corrupted_ids, "corrupted_ids": TASK.clean_ids, "source": {}}
    )
    ours = eap_ig(runs_of(model, "logit_diff", ablation), 1)
    theirs = runs_of(model, "logit_diff", task=swapped)
    if ablation == "zero":  # the path is the same, what removed edges carry is not
        assert not np.allclose(ours, -eap(theirs))
    else:
        np.testing.assert_allclose(ours, -eap(theirs), atol=1e-12)


@pytest.mark.parametrize("method", [eap, hisp])
def test_kl_is_refused_where_its_gradient_is_zero(method: Any) -> None:
    with pytest.raises(MetricError, match=r"kl.*eap-ig"):
        method(runs_of(float64("gpt2"), "kl"))


# -- exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize(
    "name", quick(["gpt2", "llama", "gpt_neox", "gemma2", "olmo2_split"], "gpt2", "olmo2_split")
)
def test_exact_is_every_edge_removed_alone(name: str, metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = float64(name)
    monkeypatch.setattr(methods, "_CANDIDATES", 5)
    scores = exact(SparseEngine(model, TASK, metric))
    judge = HooksEngine(model, TASK, metric)
    full = judge.metric_of(model.graph.all_edges)
    for reader, writer in np.argwhere(model.graph.all_edges):
        without = model.graph.all_edges.copy()
        without[reader, writer] = False
        assert abs(scores[reader, writer] - (judge.metric_of(without) - full)) < 1e-6


def test_exact_needs_no_sparse_engine() -> None:
    model = float64("llama")
    ours = exact(HooksEngine(model, TASK, "kl"))
    np.testing.assert_allclose(ours, exact(SparseEngine(model, TASK, "kl")), atol=1e-10)


# -- nodes and choices -------------------------------------------------------------------------------------

SPECS = st.builds(
    GraphSpec,
    layers=st.integers(1, 3),
    heads=st.just(4),
    kv_groups=st.sampled_from([1, 2, 4]),
    mlps=st.booleans(),
    parallel=st.booleans(),
    split_kv_groups=st.booleans(),
)


@given(SPECS, st.integers(0, 1000), st.floats(0.01, 1))
@examples(40)
def test_a_threshold_on_nodes_is_one_on_edges(spec: GraphSpec, seed: int, threshold: float) -> None:
    graph = Graph(spec)
    importance = np.random.default_rng(seed).random(len(graph.writers))
    chosen = edges_from(graph, edges_from_nodes(graph, importance), threshold, absolute=False)
    inside = {i for i, value in enumerate(importance) if value >= threshold}
    for r, reader in enumerate(graph.readers):
        reads = not reader.nodes or any(node in inside for node in reader.nodes)
        for w in range(len(graph.writers)):
            assert chosen[r, w] == (w < graph.prefix[r] and w in inside and reads)


def test_edges_of_nodes_by_hand() -> None:
    graph = Graph(GraphSpec(layers=1, heads=2, kv_groups=1))  # input, a0.h0, a0.h1, m0
    scores = edges_from_nodes(graph, np.array([0.5, 0.9, 0.1, 0.3]))
    named = {graph.edge_name(r, w): scores[r, w] for r, w in np.argwhere(graph.all_edges)}
    assert named["input->a0.h0<q>"] == 0.5 and named["input->a0.h1<q>"] == 0.1
    assert named["input->a0.kv0<k>"] == 0.5  # the group serves a0.h0
    assert named["a0.h0->m0"] == 0.3 and named["a0.h1->m0"] == 0.1
    assert named["a0.h0->logits"] == 0.9 and named["m0->logits"] == 0.3


@given(st.integers(0, 1000), st.integers(1, 200), st.booleans(), st.integers(1, 6))
@examples(60)
def test_the_best_edges(seed: int, count: int, absolute: bool, levels: int) -> None:
    graph = Graph(GraphSpec(layers=2, heads=3, kv_groups=3))
    drawn = np.random.default_rng(seed).integers(-levels, levels + 1, graph.all_edges.shape)
    scores = np.where(graph.all_edges, drawn, 0).astype(np.float64)
    count = min(count, graph.edge_count)
    kept = top_edges(graph, scores, count, absolute=absolute)
    edges = [tuple(edge) for edge in np.argwhere(graph.all_edges)]
    size = abs if absolute else float
    best = sorted(edges, key=lambda edge: -size(scores[edge]))[:count]  # stable: model order among equals
    assert {tuple(edge) for edge in np.argwhere(kept)} == set(best)


def test_more_edges_than_there_are() -> None:
    graph = Graph(GraphSpec(layers=1, heads=2, kv_groups=1))
    with pytest.raises(ConfigError, match="edges; cannot keep"):
        top_edges(graph, np.zeros(graph.all_edges.shape), graph.edge_count + 1, absolute=False)


def test_random_scores_are_their_seeds() -> None:
    graph = float64("llama").graph
    one, same, other = (random_scores(graph, seed) for seed in (3, 3, 4))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.array_equal(one > 0, graph.all_edges)


# -- low precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["fp8", "int8", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_through_low_weights_are_near_fp32s(family: str, fmt: Any) -> None:
    def scores(regime: Any) -> np.ndarray:
        config = PAHQConfig(regime) if regime == "fp32" else PAHQConfig(regime, fmt)
        model = PAHQModel(FAMILIES[family](), config)
        return model.attribute(TASK, method="eap", metric="logit_diff").scores

    full, pahq, rtn = (scores(regime) for regime in ("fp32", "pahq", "rtn"))
    size = np.linalg.norm(full)
    near, far = (np.linalg.norm(low - full) / size for low in (pahq, rtn))
    assert 0 < near < {"fp8": 0.08, "int8": 0.03, "bf16": 0.01}[fmt]
    assert near < far  # activations are exact in pahq


@pytest.mark.parametrize("regime", ["fp32", "pahq", "rtn"])
def test_gradients_through_packed_weights(regime: Any) -> None:
    """Weights may be packed for products without a backward pass: a search may be under way."""
    model = PAHQModel(FAMILIES["llama"](), PAHQConfig(regime))
    before = model.attribute(TASK, method="eap", metric="logit_diff")
    for linear in model.patched.linears():
        linear.hold_packed()
    packed = model.attribute(TASK, method="eap", metric="logit_diff")
    assert packed.scores == pytest.approx(before.scores, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_have_the_gradient_of_their_weight(dtype: torch.dtype) -> None:
    """OneDNN's own would be zero, silently."""
    weight, x = torch.randn(3, 2).to(dtype), torch.randn(4, 2, requires_grad=True)
    for product in (Product(weight).__call__, Product(weight).raw):
        (gradient,) = torch.autograd.grad(product(x).sum(), x)
        assert torch.allclose(gradient, weight.float().sum(0).expand(4, 2), atol=1e-6)


@pytest.mark.parametrize("regime", ["pahq", "rtn"])
def test_no_decoded_weight_is_kept_for_the_backward_pass(regime: Any) -> None:
    """What waits for it is activations: in FP32 PyTorch keeps the weights, which are there anyway."""

    def kept(config: PAHQConfig) -> int:
        model = PAHQModel(FAMILIES["llama"](), config).patched
        shapes = {(linear.out_features, linear.in_features) for linear in model.linears()}
        shapes |= {shape[::-1] for shape in shapes}
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        source = Runs(model, TASK, "nll", "corrupted", RegimeRule.of(config, model.device))
        (part,) = source.parts()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            source.gradients(part, source.clean.embedding)
        return sum(tuple(tensor.shape) in shapes for tensor in found)

    assert kept(FP32) > 0 and kept(PAHQConfig(regime)) == 0


def test_edges_into_logits_meet_no_low_weight() -> None:
    """In pahq activations, contributions and the unembedding are exact."""

    def scores(regime: Any) -> np.ndarray:
        model = PAHQModel(FAMILIES["llama"](), PAHQConfig(regime))
        return model.attribute(TASK, method="eap-ig", metric="kl").scores[-1]

    np.testing.assert_allclose(scores("pahq"), scores("fp32"), atol=2e-6)
