"""Engines that keep their weights low and anchor them in FP32: states, tests of edges, second looks."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pahq_hf import PAHQConfig, PAHQModel, load_task
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task
from tests.helpers import GRAPHS, random_edges, wrapped
from tests.models import FAMILIES, random_task
from tests.tiers import examples, quick

pytestmark = pytest.mark.crossing

COMPUTES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = ("fp8", "int8", "bf16")
METRICS = ("kl", "logit_diff", "nll", "prob_diff")
PADDINGS = ("none", "left", "right")
KINDS = ("q", "k", "v", "mlp", "logits")

shares = st.sampled_from([0.3, 0.6, 0.9])
seeds = st.integers(0, 10_000)
orders = st.sampled_from(["acdc", "head"])


@cache
def lowered(name: str, compute: Any = "fp32", fmt: Any = "fp8", regime: Any = "pahq") -> PatchedModel:
    """A tiny model of `GRAPHS` kept low; shared by all tests."""
    family, split = GRAPHS[name]
    config = PAHQConfig(regime, fmt, split, compute=compute)
    return PAHQModel(FAMILIES[family](), config).patched


def rule_of(compute: str = "fp32", *, full_writers: bool = False) -> RegimeRule:
    return RegimeRule(True, True, full_writers, COMPUTES[compute])


@cache
def short_task(padding: str) -> Task:
    return random_task(batch=3, length=6, padding=padding, seed=41)


@cache
def engine_of(kind: Any, name: str, metric: Any, ablation: Any, padding: str, full_writers: bool) -> Any:
    """An anchored engine. It serves many examples: `begin` starts anew."""
    rule = rule_of(full_writers=full_writers)
    return kind(lowered(name), short_task(padding), metric, ablation=ablation, rule=rule)


@cache
def fp32_engine(name: str, metric: Any, ablation: Any, padding: str) -> HooksEngine:
    """The hooks engine of the FP32 model."""
    return HooksEngine(wrapped(name).patched, short_task(padding), metric, ablation=ablation)


def midway(graph: Graph, reader: int, share: float, seed: int, order: Any = "acdc") -> BoolArray:
    """A random circuit as a search leaves it when it comes to a reader."""
    kept, come = random_edges(graph, share, seed), False
    for r in graph.reader_order(order):
        come |= r == reader
        if come:
            kept[r] = graph.all_edges[r]
        elif not graph.has_out_edge(kept, r):
            kept[r] = False
    return kept


def reaches(graph: Graph, kept: BoolArray, reader: int) -> bool:
    """Whether a search would test a reader's edges."""
    return not graph.readers[reader].nodes or graph.has_out_edge(kept, reader)


def some(writers: list[int], draw: np.random.Generator, share: float) -> list[int]:
    return [w for w in writers if draw.random() < share]


def without(kept: BoolArray, reader: int, writers: list[int]) -> BoolArray:
    smaller = kept.copy()
    smaller[reader, writers] = False
    return smaller


# -- the state is FP32 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fmt"), [*((name, "fp8") for name in GRAPHS), ("gpt2", "int8"), ("llama", "bf16")]
)
def test_circuits_are_the_fp32_models(name: str, fmt: str) -> None:
    """Whatever the format and the compute dtype: captured runs and the current circuit are exact."""
    judge = fp32_engine(name, "kl", "corrupted", "left")
    for compute in COMPUTES:
        model = lowered(name, compute, fmt)
        engine = SparseEngine(model, short_task("left"), "kl", rule=rule_of(compute))
        graph = engine.graph
        assert abs(engine.begin(graph.all_edges)) <= 1e-6
        assert torch.equal(engine.clean_logits, judge.clean_logits)
        for seed, share in enumerate((0.05, 0.4, 0.95)):
            kept = random_edges(graph, share, seed)
            assert engine.metric_of(kept) == pytest.approx(judge.metric_of(kept), abs=1e-5)
        for number, reader in enumerate(graph.reader_order("head")[:: 4 if compute == "bf16" else 2]):
            kept = midway(graph, reader, 0.6, number, "head")
            if not reaches(graph, kept, reader):
                continue
            exact = judge.metric_of(kept)
            assert engine.begin(kept) == pytest.approx(exact, abs=1e-5)
            assert engine.focus(reader) == pytest.approx(exact, abs=1e-5)
        engine.finish()
        # Without anchors the same weights are far from that.
        low = HooksEngine(model, short_task("left"), "kl").clean_logits
        assert float((low - judge.clean_logits).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_any_circuit_of_the_anchored_hooks_engine_is_fp32(name: str) -> None:
    """Before, during and after a search."""
    judge = fp32_engine(name, "kl", "corrupted", "left")
    engine = HooksEngine(lowered(name), short_task("left"), "kl", rule=rule_of())
    graph = engine.graph
    kept = random_edges(graph, 0.8, 0)
    steps = (lambda: engine.begin(graph.all_edges), lambda: engine.focus(graph.logits_reader), engine.finish)
    for step in steps:
        step()
        assert engine.metric_of(kept) == pytest.approx(judge.metric_of(kept), abs=1e-5)
        assert float((engine.logits(kept) - judge.logits(kept)).abs().max()) < 3e-5


# -- both engines make the same of low-precision weights -------------------------------------------------


def near(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs))


class Trio:
    """Both anchored engines and the FP32 model, at one reader of one random circuit."""

    def __init__(self, name: str, kind: str, full_writers: bool, draw: np.random.Generator) -> None:
        pick: Any = draw.choice
        options = {
            "metric": str(pick(METRICS)),
            "ablation": str(pick(["corrupted", "mean"])),
            "padding": str(pick(PADDINGS)),
        }
        kinds = (HooksEngine, SparseEngine)
        self.engines = [engine_of(k, name, full_writers=full_writers, **options) for k in kinds]
        self.judge = fp32_engine(name, **options)
        self.draw, self.order = draw, str(pick(["acdc", "head"]))
        graph = self.judge.graph
        readers = [r for r in range(len(graph.readers)) if graph.readers[r].kind == kind]
        alive = False
        while not alive:
            self.reader = int(pick(readers))
            seed, share = int(draw.integers(1e9)), float(pick([0.4, 0.7, 0.95]))
            self.kept = midway(graph, self.reader, share, seed, self.order)
            alive = reaches(graph, self.kept, self.reader)
        self.writers = list(graph.in_edges(self.reader))
        self.strayed = 0.0  # largest error of a test

    def start(self) -> None:
        exact = self.judge.metric_of(self.kept)
        for engine in self.engines:
            assert near(engine.begin(self.kept), exact)
            assert near(engine.focus(self.reader), exact)

    def check(self, gone: list[int]) -> None:
        """Try edges, and look at them again, on top of what is gone."""
        left = [w for w in self.writers if w not in gone]
        candidates = [[], some(left, self.draw, 0.2), some(left, self.draw, 0.6)]
        exact = [self.judge.metric_of(without(self.kept, self.reader, gone + c)) for c in candidates]
        sets = [gone + c for c in candidates]
        hooks, sparse = (engine.try_(self.reader, sets).values for engine in self.engines)
        assert all(map(near, sparse, hooks)), (sparse, hooks)
        for engine in self.engines:
            looked = engine.look_again(self.reader, sets).values
            assert all(map(near, looked, exact)), (looked, exact)
            assert engine.try_(self.reader, sets[1:2]).values[0] == pytest.approx(sparse[1], abs=1e-5)
        self.strayed = max(self.strayed, *(abs(t - e) for t, e in zip(sparse, exact, strict=True)))

    def finish(self, gone: list[int]) -> None:
        """The next reader starts from an exact state."""
        graph, kept = self.judge.graph, without(self.kept, self.reader, gone)
        order = graph.reader_order(self.order)  # type: ignore[arg-type]
        later = [r for r in order[order.index(self.reader) + 1 :] if reaches(graph, kept, r)]
        for engine in self.engines:
            for r in later[:1]:
                assert near(engine.focus(r), self.judge.metric_of(kept))
            engine.finish()
            assert not engine.session.holding.active


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRAPHS)
def test_hooks_and_sparse_agree(name: str, kind: str) -> None:
    """On tests and second looks, before and after edges go and come back."""
    for full_writers in (False, True):
        draw = np.random.default_rng([list(GRAPHS).index(name), KINDS.index(kind), full_writers])
        trio = Trio(name, kind, full_writers, draw)
        trio.start()
        trio.check([])
        gone = some(trio.writers, draw, 0.5)
        for engine in trio.engines:
            engine.cut(trio.reader, gone)
        trio.check(gone)
        back = some(gone, draw, 0.5)
        gone = [w for w in gone if w not in back]
        for engine in trio.engines:
            engine.cut(trio.reader, gone)
        trio.check(gone)
        trio.finish(gone)
        if not full_writers:
            assert trio.strayed > 2e-5  # it was low precision that they agreed on


def test_exact_differences_of_writers_are_exact() -> None:
    """At the logits reader nothing but the writers' differences is low: FP32 ones leave no error."""
    judge = fp32_engine("gpt2", "kl", "corrupted", "left")
    for kind in (HooksEngine, SparseEngine):
        errors = {}
        for full in (False, True):
            engine = engine_of(kind, "gpt2", "kl", "corrupted", "left", full)
            graph = engine.graph
            reader = graph.logits_reader
            engine.begin(graph.all_edges)
            engine.focus(reader)
            candidates = [[w] for w in graph.in_edges(reader)]
            exact = [judge.metric_of(without(graph.all_edges, reader, c)) for c in candidates]
            pairs = zip(engine.try_(reader, candidates).values, exact, strict=True)
            errors[full] = max(abs(ours - theirs) for ours, theirs in pairs)
            engine.finish()
        assert errors[True] < 2e-6 and errors[False] > 1e-4


# -- increments telescope ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_split", "mistral_window"])
def test_the_metric_depends_on_what_is_gone_not_on_how_it_went(name: str) -> None:
    @examples(15)
    @given(
        data=st.data(),
        fmt=st.sampled_from(FORMATS),
        full_writers=st.booleans(),
        share=shares,
        order=orders,
        seed=seeds,
    )
    def check(data: st.DataObject, fmt: str, full_writers: bool, share: float, order: str, seed: int) -> None:
        rule = rule_of(full_writers=full_writers)
        engine = SparseEngine(lowered(name, "fp32", fmt), short_task("right"), "kl", rule=rule)
        graph = engine.graph
        tested = [
            r for r in graph.reader_order(order) if reaches(graph, midway(graph, r, share, seed, order), r)
        ]
        reader = data.draw(st.sampled_from(tested))
        kept = midway(graph, reader, share, seed, order)
        writers = list(graph.in_edges(reader))
        gone = data.draw(st.lists(st.sampled_from(writers), min_size=1, unique=True))
        engine.begin(kept)
        engine.focus(reader)
        at_once = engine.try_(reader, [sorted(gone)]).values[0]
        left = list(gone)  # in the drawn order, in increments, with detours
        while left:
            step = left[: data.draw(st.integers(1, len(left)))]
            here = gone[: len(gone) - len(left)]
            trial = engine.try_(reader, [[*here, *step[: k + 1]] for k in range(len(step))])
            engine.accept(trial, len(step) - 1)
            if data.draw(st.booleans()):
                engine.look_again(reader, [[], step])
            if data.draw(st.booleans()):
                back = data.draw(st.integers(0, len(step) - 1))
                engine.cut(reader, [*here, *step[:back]])
                engine.accept(trial, len(step) - 1)
            assert abs(engine.try_(reader, [[*here, *step]]).values[0] - trial.values[-1]) <= 1e-6
            left = left[len(step) :]
        assert abs(engine.try_(reader, [gone]).values[0] - at_once) <= 1e-6
        engine.focus(reader)  # an edge set, whatever led there, is one state
        again = engine.begin(without(kept, reader, gone))
        assert engine.focus(reader) == again
        engine.finish()

    check()


# -- errors vanish with the effect ---------------------------------------------------------------------------


def scores(engine: SparseEngine, share: float = 1.0, step: int = 1) -> NDArray[np.float64]:
    """`new - cur` of single edges, at readers of a search's circuits."""
    found, graph = [], engine.graph
    for reader in range(0, len(graph.readers), step):
        kept = midway(graph, reader, share, 1)
        if not reaches(graph, kept, reader):
            continue
        begun = engine.begin(kept)
        focused = engine.focus(reader)
        cur = begun if focused is None else focused
        tried = engine.try_(reader, [[w] for w in graph.in_edges(reader)]).values
        found += [v - cur for v in tried]
    engine.finish()
    return np.array(found)


def errors(
    ours: NDArray[np.float64], exact: NDArray[np.float64], least: float | None = None
) -> NDArray[np.float64]:
    """Relative errors of scores that are not tiny; by default of those above a hundredth of the largest."""
    large = np.abs(exact) > (0.01 * np.abs(exact).max() if least is None else least)
    assert large.sum() > 20
    relative: NDArray[np.float64] = np.abs(ours - exact)[large] / np.abs(exact)[large]
    return relative


@cache
def alike(epsilon: float, regime: Any, fmt: Any = "fp8", compute: Any = "fp32") -> PatchedModel:
    """A Llama whose tokens differ little, so that what edges carry is small beside the activations."""
    model = FAMILIES["llama"]()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_(table[0] + epsilon * (table - table[0]))
    return PAHQModel(model, PAHQConfig(regime, fmt, compute=compute)).patched


# A score of kl is of second order in what an edge carries: at .1 a hundred times smaller than at 1.
@pytest.mark.parametrize(
    ("metric", "epsilon"), [("logit_diff", 1.0), ("logit_diff", 0.01), ("nll", 0.1), ("kl", 1.0), ("kl", 0.1)]
)
def test_bf16_products_cost_little_whatever_the_effects_size(metric: Any, epsilon: float) -> None:
    """Compared with FP32 products of the same weights."""
    task = random_task(batch=3, length=7, seed=3)
    fp32, bf16 = (
        scores(SparseEngine(alike(epsilon, "pahq", "fp8", c), task, metric, rule=rule_of(c)), 0.9)
        for c in COMPUTES
    )
    strayed = errors(bf16, fp32)
    assert np.median(strayed) < 0.01 and np.quantile(strayed, 0.9) < 0.03
    assert strayed.max() > 1e-4  # it was BF16


@pytest.mark.parametrize("fmt", quick(["fp8", "int8"], "fp8"))
def test_errors_of_anchored_scores_shrink_with_the_effects(fmt: str) -> None:
    """A hundredth of the effect, a hundredth of the error."""
    task = random_task(batch=3, length=7, seed=3)
    for epsilon in (1.0, 0.01):
        exact = scores(SparseEngine(alike(epsilon, "fp32"), task, "logit_diff"))
        rtn = scores(SparseEngine(alike(epsilon, "rtn", fmt), task, "logit_diff"))
        ours = scores(SparseEngine(alike(epsilon, "pahq", fmt), task, "logit_diff", rule=rule_of()))
        median = np.median(errors(ours, exact))
        assert 1e-4 < median < (0.05 if fmt == "fp8" else 0.01)
        assert 2 * median < np.median(errors(rtn, exact))


@cache
def demo(regime: Any, compute: Any = "fp32") -> PAHQModel:
    return PAHQModel.from_pretrained("demo", PAHQConfig(regime, compute=compute))


@cache
def demo_scores(regime: Any, compute: Any = "fp32") -> NDArray[np.float64]:
    task = load_task("ioi", demo("fp32").tokenizer, n=4)
    rule = rule_of(compute) if regime == "pahq" else None
    return scores(SparseEngine(demo(regime, compute).patched, task, "kl", rule=rule), step=2)


@pytest.mark.parametrize("compute", quick(COMPUTES, "bf16"))
def test_anchored_scores_of_the_demo_are_closer_than_rounded_ones(compute: str) -> None:
    exact = demo_scores("fp32")
    for least in (1e-4, 3e-4):
        anchored = errors(demo_scores("pahq", compute), exact, least)
        rounded = errors(demo_scores("rtn"), exact, least)
        assert 3 * np.median(anchored) < np.median(rounded), least
        assert 2 * np.quantile(anchored, 0.9) < np.quantile(rounded, 0.9), least
