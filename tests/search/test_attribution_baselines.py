"""Attribution methods of other papers against their definitions, by finite differences in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pahq_hf import PAHQConfig, PAHQModel, Task
from pahq_hf.capture.recording import answer_logits
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.engine.hooks import gradient_runs
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.hooks.gradient_runs import Runs
from pahq_hf.engine.hooks.patched_run import PatchedRun
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.errors import ConfigError, MetricError, RunError, UnsupportedModelError
from pahq_hf.modeling.hooks import hooks
from pahq_hf.modeling.norms import epsilon_of
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.search.attribution.kinds import METHODS, check_gradient
from pahq_hf.search.attribution.methods import (
    clean_corrupted,
    eap,
    eap_ig,
    eap_ig_activations,
    gim,
    passes_over_activations,
)
from tests.families import ALL_FAMILIES
from tests.helpers import ALL_GRAPHS, FP32, run_main, wrapped
from tests.models import FAMILIES, random_task, tiny_gpt2
from tests.tiers import quick

pytestmark = pytest.mark.crossing

TASK = random_task(batch=3, padding="left", seed=5, rows=2)
NAMES = [
    *("gpt2", "llama", "llama_split", "gpt_neox", "gemma2", "olmo2", "falcon", "qwen3"),
    *("bloom", "granite", "stablelm"),
]
COARSE = {"gemma2": 1e-4, "mixtral": 1e-3}  # their own code computes in float32 now and then


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


# -- gim ---------------------------------------------------------------------------------------------------


class Surrogate:
    """A model that is the patched one at the clean run, and whose derivative there is GIM's backward pass.

    Norms divide by the scales of the clean run; a softmax is `p0 + 2 (softmax(s / 2) - softmax(s0 / 2))`;
    queries, keys, values, gates and what they gate are `y0 + share (y - y0)`. The first run is the clean one.
    """

    def __init__(self, model: PatchedModel) -> None:
        self.model = model
        self.clean: dict[object, Tensor] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        replaced: list[tuple[nn.Module, str]] = []
        handles = []

        def replace(module: nn.Module, name: str, function: Any) -> None:
            vars(module)[name] = partial(function, module)
            replaced.append((module, name))

        for module in self.model.hf.modules():
            if type(module).__name__.endswith("RMSNorm"):
                replace(module, "forward", self.rms_norm)
            elif isinstance(module, nn.LayerNorm):
                replace(module, "forward", self.layer_norm)
            gates = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "gate_up_proj")]
            for gate in (*gates, *getattr(module, "gate_up", [])):
                if isinstance(gate, nn.Module):
                    handles.append(gate.register_forward_hook(self.gate))
        for layer in self.model.layers:
            replace(layer.attention, "probabilities", self.probabilities)
            handles.append(layer.attention.register_forward_pre_hook(self.project, with_kwargs=True))
        try:
            yield
        finally:
            for module, name in replaced:
                del vars(module)[name]
            for handle in handles:
                handle.remove()

    def first(self, key: object, value: Tensor) -> Tensor:
        return self.clean.setdefault(key, value.clone())

    def shared(self, key: object, y: Tensor, share: float) -> Tensor:
        start = self.first(key, y)
        return start + share * (y - start)

    def gate(self, gate: nn.Module, _: Any, y: Tensor) -> Tensor:
        return self.shared(gate, y, 0.5)

    def project(self, attention: nn.Module, args: Any, kwargs: Any) -> Any:
        shares = {"q": 0.25, "k": 0.25, "v": 0.5}
        return args, {**kwargs, "projected": lambda kind, y: self.shared((attention, kind), y, shares[kind])}

    def rms_norm(self, norm: Any, x: Tensor) -> Tensor:
        scale = self.first(norm, (x.pow(2).mean(-1, keepdim=True) + epsilon_of(norm)).rsqrt())
        return x * scale * (norm.weight + self.model.arch.norm_offset)

    def layer_norm(self, norm: Any, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        scale = self.first(norm, (x.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt())
        made: Tensor = x * scale * norm.weight
        return made if norm.bias is None else made + norm.bias

    def probabilities(self, attention: Any, products: Tensor, bias: Tensor | None, _: Any) -> Tensor:
        scores = products * attention.scaling
        if attention.softcap is not None:
            scores = torch.tanh(scores / attention.softcap) * attention.softcap
        scores = scores if bias is None else scores + bias
        start = self.first((attention, "scores"), scores)
        return start.softmax(-1) + 2 * ((scores / 2).softmax(-1) - (start / 2).softmax(-1))


OF_GIM = ["gpt2", "llama", "llama_split", "gpt_neox", "gemma2", "qwen3", "bloom", "granite", "phi3"]


@pytest.mark.parametrize("name", quick([*OF_GIM, "mixtral"], "llama", "gemma2"))
def test_gim_is_the_derivative_of_a_surrogate(name: str) -> None:
    source = runs_of(float64(name), "logit_diff")
    scores, graph, referee = gim(source), source.graph, Referee(source)
    assert only_edges(scores, graph.all_edges)
    scale = np.abs(scores).max()
    surrogate = Surrogate(source.model)
    with surrogate.in_place():
        clean = referee.metric(TASK.clean_ids, nothing(graph))
        assert clean == pytest.approx(source.metric(source.clean.logits), abs=1e-5)
        for edge in some_edges(graph, 14):
            slope = referee.slope(TASK.clean_ids, nothing(graph), edge)
            assert abs(scores[edge] - slope) < {"mixtral": 1e-3}.get(name, COARSE.get(name, 1e-6)) * scale, (
                edge
            )
    assert np.abs(scores - eap(source)).max() > 0.01 * scale


def test_gim_leaves_the_model_as_it_was() -> None:
    source = runs_of(float64("olmo2"), "logit_diff")
    norms = [(module, type(module)) for module in source.model.hf.modules()]
    before = eap(source)
    gim(source)
    assert all(type(module) is kind for module, kind in norms)
    assert np.array_equal(eap(source), before)


def test_gim_refuses_a_norm_it_does_not_know() -> None:
    class Doubling(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hf = tiny_gpt2(dtype=torch.float64)
    hf.transformer.ln_f.__class__ = Doubling
    model = PAHQModel(hf, FP32).patched
    with pytest.raises(UnsupportedModelError, match="does not know how Doubling normalises"):
        gim(runs_of(model, "logit_diff"))
    assert type(model.final_norm) is Doubling


@pytest.mark.parametrize("method", ["eap-ig-activations", "clean-corrupted", "gim"])
def test_through_low_weights_scores_are_near_those_of_fp32(method: Any) -> None:
    def scores(regime: Any) -> np.ndarray:
        model = PAHQModel(FAMILIES["llama"](), PAHQConfig(regime))
        steps = {"steps": 2} if "steps" in METHODS[method].takes else {}
        return model.attribute(TASK, method=method, metric="logit_diff", **steps).scores

    full, pahq, rtn = (scores(regime) for regime in ("fp32", "pahq", "rtn"))
    near, far = (np.linalg.norm(low - full) / np.linalg.norm(full) for low in (pahq, rtn))
    assert 0 < near < 0.08 and near < far


# -- ensemble ----------------------------------------------------------------------------------------------


def test_an_ensemble_is_the_mean_of_shares() -> None:
    model = wrapped("llama")

    def scores(**options: Any) -> np.ndarray:
        return model.attribute(TASK, metric="logit_diff", **options).scores

    each = [scores(method=name) for name in ("eap-ig", "gim", "exact", "random")]
    shares = [one / np.abs(one).sum() for one in each]
    found = scores(method="ensemble", members="random, eap-ig,exact,gim")
    np.testing.assert_allclose(found, sum(shares) / 4, rtol=1e-6, atol=1e-9)
    assert np.abs(found).sum() <= 1 + 1e-9


def test_the_members_of_an_ensemble_are_written_down(tmp_path: Path) -> None:
    model = wrapped("gpt2")
    first = model.attribute(TASK, method="ensemble", members="eap,gim", metric="nll", topn=9, out=tmp_path)
    assert first.discovery["arguments"]["members"] == "eap,gim"
    assert (
        "mean of" in (tmp_path / "README.md").read_text() or "eap,gim" in (tmp_path / "README.md").read_text()
    )
    again = {"method": "ensemble", "metric": "nll", "topn": 9, "out": tmp_path, "resume": True}
    assert np.array_equal(model.attribute(TASK, members="eap,gim", **again).scores, first.scores)
    with pytest.raises(RunError, match="members"):
        model.attribute(TASK, members="eap,hisp", **again)
    plain = model.attribute(TASK, method="eap", metric="nll", topn=9)
    assert "members" not in plain.discovery["arguments"]


@pytest.mark.parametrize("members", ["eap", "eap,eap", "eap,ensemble", "eap,acdc", "", "eap,"])
def test_members_that_are_none(members: str) -> None:
    with pytest.raises(ConfigError, match="members must be two or more different methods"):
        wrapped("gpt2").attribute(TASK, method="ensemble", members=members)


def test_an_ensemble_refuses_what_its_members_do() -> None:
    with pytest.raises(MetricError, match="gim cannot use kl"):
        wrapped("gpt2").attribute(TASK, method="ensemble", members="eap-ig,gim", metric="kl")
    with pytest.raises(ConfigError, match="criterion gap means nothing for method ensemble"):
        wrapped("gpt2").attribute(TASK, method="ensemble", criterion="gap")


def test_members_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["attribute", "demo", "--task", "sva", "--n", "2", "--method", "ensemble", "--topn", "20"]
    assert run_main(*ask, "--members", "eap,gim", "--out", str(tmp_path / "a"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["arguments"]["members"] == "eap,gim"
    assert run_main(*ask, "--members", "eap,gems", "--out", str(tmp_path / "b")) == 2
    assert "members must be two or more different methods" in capsys.readouterr().err


def test_a_screen_by_an_ensemble() -> None:
    circuit = wrapped("gpt2").discover(TASK, threshold=0.01, metric="kl", screen="ensemble:0.3")
    assert circuit.discovery["screen"]["method"] == "ensemble"
    assert circuit.edge_count <= circuit.discovery["screen"]["survivors"]


# -- what a metric has to have -----------------------------------------------------------------------------


def test_kl_has_a_gradient_at_the_corrupted_run() -> None:
    check_gradient("clean-corrupted", "kl")
    check_gradient("eap-ig-activations", "kl")
    with pytest.raises(MetricError, match=r"gim.*kl"):
        check_gradient("gim", "kl")
