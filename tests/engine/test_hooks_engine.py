"""The hooks engine against the referee, and what it leaves behind in the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pahq_hf import PAHQModel
from pahq_hf.capture.recording import answer_logits, capture
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.errors import MetricError, TaskError
from pahq_hf.tasks.metrics import Metric
from tests.helpers import FP32, GRAPHS, named, random_edges, referee, wrapped
from tests.models import FAMILIES, HEADS, VOCAB, random_task

pytestmark = pytest.mark.crossing

ABLATIONS = ["corrupted", "zero", "mean", "mean-corrupted"]
PADDINGS = ["none", "left", "right"]


def engine_of(model: PAHQModel, task: Any, metric: Any = "kl", **options: Any) -> HooksEngine:
    return HooksEngine(model.patched, task, metric, **options)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).abs().max())


def hook_count(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


# -- any edge set -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", GRAPHS)
def test_random_circuits_equal_the_referees(name: str, padding: str, ablation: Any) -> None:
    task = random_task(batch=4, padding=padding, rows=2, seed=1)
    judge = referee(name, task, ablation=ablation)
    wide = engine_of(wrapped(name, dtype=torch.float64), task, ablation=ablation)
    narrow = engine_of(wrapped(name), task, ablation=ablation)
    seen = []
    for seed, share in enumerate((0.05, 0.5, 0.95)):
        kept = random_edges(wide.graph, share, seed)
        expected = judge.circuit_logits(judge.edge_set - named(wide.graph, kept))
        assert distance(wide.logits(kept), expected) < 1e-9
        assert distance(narrow.logits(kept), expected) < 3e-5
        seen.append(expected)
    assert distance(seen[0], seen[1]) > 0.1  # the edge sets do differ in what they do
    assert distance(seen[1], seen[2]) > 0.1


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", GRAPHS)
def test_all_edges_are_the_full_model_and_none_the_corrupted_run(name: str, padding: str) -> None:
    task = random_task(batch=4, padding=padding, rows=2, seed=2)
    model = wrapped(name, dtype=torch.float64)
    engine = engine_of(model, task)
    clean = answer_logits(model.patched, task, task.clean_ids)
    corrupted = answer_logits(model.patched, task, task.corrupted_ids)
    assert distance(engine.logits(engine.graph.all_edges), clean) < 1e-12
    assert distance(engine.logits(engine.graph.no_edges()), corrupted) < 1e-12
    assert distance(clean, corrupted) > 0.1
    assert engine.metric_of(engine.graph.all_edges) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", ["kl", "logit_diff", "nll", "prob_diff"])
def test_metric_of_a_circuit_equals_the_referees(metric: Any) -> None:
    task = random_task(batch=4, padding="left", rows=2, seed=3)
    judge = referee("llama", task, metric=metric)
    engine = engine_of(wrapped("llama", dtype=torch.float64), task, metric)
    for seed in range(3):
        kept = random_edges(engine.graph, 0.6, seed)
        expected = judge.metric(judge.edge_set - named(engine.graph, kept))
        assert engine.metric_of(kept) == pytest.approx(expected, abs=1e-9)
    assert abs(expected) > 1e-3


def test_the_window_of_a_mistral_cuts_something_off() -> None:
    """Otherwise the windowed cases above would show nothing."""
    task = random_task(batch=4, seed=1)
    near, far = (
        engine_of(wrapped(name), task).logits(random_edges(wrapped(name).graph, 0.5, 0))
        for name in ("mistral_window", "mistral")
    )
    assert distance(near, far.double()) > 0.1


# -- one head's inputs are its own ------------------------------------------------------------------


@contextmanager
def recorded_z(model: PAHQModel) -> Iterator[list[Tensor]]:
    """What every layer's output projection receives, head by head. [batch, pos, head, d_head] per layer"""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].unflatten(-1, (HEADS, -1)).clone())

    handles = [layer.attention.o_proj.register_forward_pre_hook(keep) for layer in model.patched.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_split", "qwen2"])
def test_patching_a_heads_input_changes_that_head_and_no_other(name: str, kind: Any, layer: int) -> None:
    """For every head's q, and for the k and v of every group, whose heads all change."""
    model = wrapped(name, dtype=torch.float64)
    engine = engine_of(model, random_task(seed=4))
    graph = engine.graph
    with recorded_z(model) as clean:
        engine.logits(graph.all_edges)
    readers = graph.layer_readers(layer, kind)
    expected_heads = set()
    for reader in readers:
        mine = {node - graph.head_writer(layer, 0) for node in graph.readers[reader].nodes}
        kept = graph.all_edges.copy()
        kept[reader] = False
        with recorded_z(model) as seen:
            engine.logits(kept)
        change = (seen[layer] - clean[layer]).abs().amax((0, 1, 3))
        for head in range(HEADS):
            assert (change[head] > 1e-2) if head in mine else (change[head] < 1e-12), (reader, head)
        expected_heads |= mine
    assert expected_heads == set(range(HEADS))
    assert len(readers) == (2 if name in ("llama", "qwen2") and kind != "q" else HEADS)


def test_one_edge_into_a_group_reaches_all_its_heads_and_split_only_one() -> None:
    for name, label, heads in (("llama", "a1.kv1<k>", {2, 3}), ("llama_split", "a1.h2<k>", {2})):
        model = wrapped(name, dtype=torch.float64)
        engine = engine_of(model, random_task(seed=4))
        kept = engine.graph.all_edges.copy()
        kept[engine.graph.parse_edge(f"m0->{label}")] = False
        with recorded_z(model) as clean:
            engine.logits(engine.graph.all_edges)
        with recorded_z(model) as seen:
            engine.logits(kept)
        change = (seen[1] - clean[1]).abs().amax((0, 1, 3))
        assert {h for h in range(HEADS) if change[h] > 1e-12} == heads


# -- the protocol of the search ----------------------------------------------------------------------


def test_candidates_say_exactly_what_is_gone_and_change_nothing() -> None:
    engine = engine_of(wrapped("llama", dtype=torch.float64), random_task(seed=5))
    graph = engine.graph
    start = random_edges(graph, 0.8, 0)
    assert engine.begin(start) == engine.metric_of(start)
    reader = graph.reader_index("m1")
    writers = [int(w) for w in np.flatnonzero(start[reader])][::-1]
    candidates = [writers[: k + 1] for k in range(4)]
    expected = []
    for candidate in candidates:
        kept = start.copy()
        kept[reader, candidate] = False
        expected.append(engine.metric_of(kept))
    gone = np.flatnonzero(graph.all_edges[reader] & ~start[reader]).tolist()
    sets = [[*gone, *candidate] for candidate in candidates]
    trial = engine.try_(reader, sets)
    assert list(trial.values) == expected
    assert engine.try_(reader, sets) == trial
    assert engine.try_(reader, [gone]).values == (engine.metric_of(start),)
    assert len(set(expected)) == 4
    engine.accept(trial, 1)
    assert engine.try_(reader, [sets[2], sets[0]]).values == (expected[2], expected[0])
    assert engine.focus(reader) is None  # no precision to change


def test_evaluations_count_every_value() -> None:
    engine = engine_of(wrapped("gpt2"), random_task())
    engine.begin(engine.graph.all_edges)
    engine.try_(engine.graph.logits_reader, [[0], [1], [2]])
    engine.metric_of(engine.graph.no_edges())
    assert engine.evaluations == 5


# -- nothing stays behind ---------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop(*_: object) -> None:
    raise Stop


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hooks_are_gone_after_a_run_and_after_an_exception(name: str) -> None:
    model = wrapped(name)
    task = random_task()
    before = hook_count(model)
    engine = engine_of(model, task)
    kept = random_edges(engine.graph, 0.5, 0)
    expected = engine.logits(kept)
    assert hook_count(model) == before
    for module in (
        model.patched.layers[0].mlp.module,
        model.patched.layers[1].attention,
        model.patched.final_norm,
    ):
        handle = module.register_forward_hook(stop)
        with pytest.raises(Stop):
            engine.logits(kept)
        with pytest.raises(Stop):
            capture(model.patched, task, task.clean_ids)
        handle.remove()
        assert hook_count(model) == before
    assert torch.equal(engine.logits(kept), expected)


def test_a_search_goes_on_from_its_anchors_after_an_exception() -> None:
    """What interrupts a look in between, be it at another circuit or in FP32, changes no test after it."""
    model, task = wrapped("llama", regime="pahq"), random_task(seed=6)
    engine = engine_of(model, task, rule=RegimeRule.of(model.pahq_config, model.patched.device))
    graph = engine.graph
    reader = graph.reader_index("m1")
    engine.begin(random_edges(graph, 0.8, 0))
    engine.focus(reader)
    expected = engine.try_(reader, [[0], [1, 2]])
    exact = engine.look_again(reader, [[0], [1, 2]])
    for look in (lambda: engine.metric_of(graph.no_edges()), lambda: engine.look_again(reader, [[0]])):
        handle = model.patched.final_norm.register_forward_hook(stop)
        with pytest.raises(Stop):
            look()
        handle.remove()
        assert engine.try_(reader, [[0], [1, 2]]) == expected
    assert expected.values != exact.values  # low precision is at work: the anchors do matter


def test_the_model_computes_as_before_after_runs() -> None:
    model, task = wrapped("llama"), random_task()
    before = answer_logits(model.patched, task, task.clean_ids)
    engine_of(model, task).logits(model.graph.no_edges())
    assert torch.equal(answer_logits(model.patched, task, task.clean_ids), before)


# -- inputs it refuses ------------------------------------------------------------------------------


def test_nan_in_a_run_is_an_error_before_any_search() -> None:
    """A poisoned token may be in the clean prompts or in the corrupted ones only."""
    task = random_task(batch=2, seed=6)
    clean, corrupted = set(task.clean_ids.flatten().tolist()), set(task.corrupted_ids.flatten().tolist())
    for token in (min(clean - corrupted), min(corrupted - clean)):
        model = PAHQModel(FAMILIES["llama"](), FP32)
        model.patched.embedding.weight[token] = float("nan")
        with pytest.raises(MetricError, match="kl came out as nan"):
            engine_of(model, task)


def test_prompts_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(TaskError, match=f"token id {VOCAB + 6}"):
        engine_of(wrapped("llama"), random_task(vocab=VOCAB + 7, batch=20, seed=1))
    with pytest.raises(TaskError, match="at most 64"):
        engine_of(wrapped("llama"), random_task(length=65))


# -- the paper's rule: the active head in FP32 --------------------------------------------------------


@pytest.fixture
def literal() -> PAHQModel:
    return wrapped("llama", regime="pahq-literal")


def full_weights() -> dict[str, Tensor]:
    """The FP32 projections of the second layer."""
    attention = wrapped("llama").patched.layers[1].attention
    return {kind: getattr(attention, f"{kind}_proj").dense() for kind in "qkvo"}


@pytest.mark.parametrize(("label", "heads"), [("a1.h2<q>", [2]), ("a1.kv0<v>", [0, 1])])
def test_focus_raises_the_active_heads_in_both_runs(literal: PAHQModel, label: str, heads: list[int]) -> None:
    task = random_task(seed=7)
    engine = engine_of(literal, task, rule=RegimeRule(raise_active=True))
    attention, d_head = literal.patched.layers[1].attention, literal.patched.layers[1].attention.d_head
    low = {kind: getattr(attention, f"{kind}_proj").dense() for kind in "qkvo"}
    low_corrupted = capture(literal.patched, task, task.corrupted_ids)
    assert engine.begin(engine.graph.all_edges) == pytest.approx(0, abs=1e-12)
    measured = engine.focus(engine.graph.reader_index(label))
    try:
        full = full_weights()
        for kind in "qkvo":
            # Rows of q, k, v (keys and values by group) and columns of o are FP32, exactly the active ones.
            mine = sorted({head // 2 for head in heads}) if kind in "kv" else heads
            with engine.session():
                now = getattr(attention, f"{kind}_proj").dense()
            blocks, before, exact = (
                (t.T if kind == "o" else t).unflatten(0, (-1, d_head)) for t in (now, low[kind], full[kind])
            )
            for block in range(blocks.shape[0]):
                assert torch.equal(blocks[block], (exact if block in mine else before)[block])
                assert not torch.equal(before[block], exact[block])
        # The metric is that of the full model so raised, against the reference of the run: all low.
        with engine.session():
            raised = answer_logits(literal.patched, task, task.clean_ids)
            fresh = capture(literal.patched, task, task.corrupted_ids).z[1]
        assert measured == pytest.approx(Metric("kl", task, engine.clean_logits)(raised), abs=1e-7)
        assert measured is not None and measured > 1e-6
        # In the corrupted run too the active heads' outputs are those of FP32 weights ...
        assert distance(engine.substitute.z[1], fresh.double()) < 1e-6
        assert (fresh[:, :, heads] - low_corrupted.z[1][:, :, heads]).abs().max() > 1e-3
        # ... and everything else in it is the constant it was.
        assert torch.equal(engine.substitute.z[0], low_corrupted.z[0])
        assert all(map(torch.equal, engine.substitute.mlp, low_corrupted.mlp))
        assert engine.focus(engine.graph.reader_index(label)) is None  # nothing changes the second time
    finally:
        engine.finish()
    assert not engine.session.holding.active and not engine.session.holding.raised
    assert all(map(torch.equal, engine.substitute.z, low_corrupted.z))
    assert engine.metric_of(engine.graph.all_edges) == pytest.approx(0, abs=1e-12)
    for kind in "qkvo":
        assert torch.equal(getattr(attention, f"{kind}_proj").dense(), low[kind])


def test_focus_on_an_mlp_and_on_logits(literal: PAHQModel) -> None:
    task = random_task(seed=7)
    engine = engine_of(literal, task, rule=RegimeRule(raise_active=True))
    low = capture(literal.patched, task, task.corrupted_ids)
    graph = engine.graph
    engine.begin(graph.all_edges)
    try:
        assert engine.focus(graph.logits_reader) is None  # final norm and unembedding are FP32 anyway
        assert engine.focus(graph.reader_index("m0")) is not None
        assert engine.session.holding.active == {"m0"}
        with engine.session():
            fresh = capture(literal.patched, task, task.corrupted_ids).mlp[0]
        assert torch.equal(engine.substitute.mlp[0], fresh)
        assert not torch.equal(fresh, low.mlp[0])
        # From one component to the next: the first goes back to what it was.
        assert engine.focus(graph.reader_index("a0.h1<q>")) is not None
        assert torch.equal(engine.substitute.mlp[0], low.mlp[0])
        assert engine.session.holding.active == {"a0.h1"}
        assert engine.focus(graph.logits_reader) == pytest.approx(0, abs=1e-12)
    finally:
        engine.finish()
    assert all(map(torch.equal, engine.substitute.mlp, low.mlp))


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_focus_leaves_fixed_ablations_alone(literal: PAHQModel, ablation: Any) -> None:
    engine = engine_of(literal, random_task(seed=7), ablation=ablation, rule=RegimeRule(raise_active=True))
    before = [z.clone() for z in engine.substitute.z]
    try:
        assert engine.focus(engine.graph.reader_index("a1.h2<q>")) is not None
        assert all(map(torch.equal, engine.substitute.z, before))
    finally:
        engine.finish()


def test_without_raising_nothing_is_raised(literal: PAHQModel) -> None:
    engine = engine_of(literal, random_task())
    assert engine.focus(engine.graph.reader_index("a1.h2<q>")) is None
    assert not engine.session.holding.active
