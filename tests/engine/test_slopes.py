"""Gradients at a reader, against the metric of circuits in which edges are removed by a little.

Two judges, which take no gradients: the referee of `tests/referee.py`, whose circuits may lack a fraction of
an edge, and for families it does not know a run of the model whose reader reads a little less.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pahq_hf import PAHQModel, Task
from pahq_hf.capture.recording import answer_logits, capture
from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.hooks import passes
from pahq_hf.engine.hooks.patched_run import PatchedRun
from pahq_hf.engine.hooks.slopes import ProbedRun
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.setting import Setting
from pahq_hf.engine.sparse.budget import MemoryBudget
from pahq_hf.errors import MetricError
from pahq_hf.modeling.hooks import hooks
from pahq_hf.tasks.metrics import Metric, MetricSpec, find_metric, known_metrics, register_metric
from tests.families import ALL_FAMILIES, IN_FLOAT64
from tests.helpers import ALL_GRAPHS, FP32, random_edges, referee, wrapped
from tests.models import random_task, tiny_gpt2
from tests.referee import Referee
from tests.tiers import quick

pytestmark = pytest.mark.crossing

KINDS = ("hooks", "sparse")
QUICK_FAMILIES = ("gpt2", "llama", "gemma2", "olmo2", "falcon", "mixtral", "qwen3_moe", "bloom")
REGIMES = ("fp32", "pahq", "pahq-literal", "rtn")
TASKS = {padding: random_task(padding=padding, seed=5, rows=2) for padding in ("left", "none", "right")}
LEFT = TASKS["left"]


def engine_of(
    kind: Any, model: PAHQModel, metric: str, task: Task = LEFT, ablation: Any = "corrupted"
) -> Engine:
    setting = Setting(model.patched, task, metric, ablation, model.pahq_config)
    return make_engine(setting, EngineConfig(kind))


def some_readers(graph: Graph, layer: int = 1) -> list[int]:
    """The output, and one reader of every kind in a layer, all at different places in it."""
    kinds: list[Any] = ["q", "k", "v", "mlp"]
    found = [graph.layer_readers(layer, kind) for kind in kinds]
    return [graph.logits_reader] + [r[n % len(r)] for n, r in enumerate(found, 1) if r]


def some_candidates(graph: Graph, reader: int) -> list[list[int]]:
    """None of a reader's edges gone, some, and all."""
    chosen = np.random.default_rng(reader).random(len(graph.writers)) < 0.4
    edges = list(graph.in_edges(reader))
    return [[], [writer for writer in edges if chosen[writer]], edges]


def removed_by(graph: Graph, kept: BoolArray, reader: int, gone: Sequence[int]) -> BoolArray:
    """What is gone in a circuit when exactly these edges into a reader are. [readers, writers]"""
    removed = graph.all_edges & ~kept
    removed[reader] = False
    removed[reader, list(gone)] = True
    return removed


def close(ours: NDArray[np.float64], theirs: NDArray[np.float64], tolerance: float) -> None:
    """Assert equality, up to a share of the largest."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


# -- central differences -----------------------------------------------------------------------------------


def referee_metric(judge: Referee, strengths: Tensor) -> float:
    """The metric where each edge lacks a fraction. [readers, writers]"""
    logits = judge._run(judge.clean_input, strengths, judge.c)[1]
    log_p = logits.log_softmax(-1)
    rows = [judge._row_metric(i, logits[i], log_p[i]) for i in range(len(judge.rows))]
    values = torch.tensor(rows, dtype=torch.float64)
    return float(torch.stack([values[judge.rows == e].mean() for e in set(judge.rows.tolist())]).mean())


def referee_slopes(
    judge: Referee, graph: Graph, removed: BoolArray, reader: int, writers: Sequence[int], step: float
) -> list[float]:
    """Central differences of the referee's metric in the strength of edges into a reader."""
    gone = torch.zeros(len(judge.readers), len(judge.writers), dtype=torch.float64)
    row = [judge.reader_index[graph.readers[r].name] for r in range(len(graph.readers))]
    column = [judge.writer_index[writer.name] for writer in graph.writers]
    for r, w in edge_list(removed):
        gone[row[r], column[w]] = 1
    found = []
    for writer in writers:
        ends = []
        for sign in (1, -1):
            moved = gone.clone()
            moved[row[reader], column[writer]] += sign * step
            ends.append(referee_metric(judge, moved))
        found.append((ends[0] - ends[1]) / (2 * step))
    return found


@pytest.mark.parametrize(
    ("metric", "ablation", "padding"),
    [
        ("kl", "corrupted", "left"),
        ("logit_diff", "zero", "none"),
        ("nll", "mean", "right"),
        ("prob_diff", "corrupted", "right"),
        ("match_nll", "zero", "left"),
    ],
)
@pytest.mark.parametrize(
    "name", quick(ALL_GRAPHS, "gpt2", "llama", "gpt_neox", "gemma2", "falcon", "olmo2_split")
)
@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_what_a_little_less_of_an_edge_does(
    kind: str, name: str, metric: str, ablation: Any, padding: str
) -> None:
    """At a random circuit with none of the reader's edges gone, some, and all; of edges gone or not."""
    task = TASKS[padding]
    engine = engine_of(kind, wrapped(name, dtype=torch.float64), metric, task, ablation)
    judged = "nll" if metric == "match_nll" else metric
    judge, graph = referee(name, task, metric=judged, ablation=ablation), engine.graph
    kept = random_edges(graph, 0.7, seed=1)
    engine.begin(kept)
    step = 1e-7 if ablation == "zero" else 1e-6  # norms bend sharply where a reader reads next to nothing
    ours, theirs = [], []
    for reader in some_readers(graph):
        candidates, writers = some_candidates(graph, reader), list(graph.in_edges(reader))
        if ablation == "zero":
            del candidates[-1]  # for norms of nothing no step is small enough
        slopes = engine.slopes(reader, candidates, writers)
        assert slopes.writers == tuple(writers) and slopes.effects.dtype == np.float64
        ours.append(slopes.effects.flatten())
        for gone in candidates:
            removed = removed_by(graph, kept, reader, gone)
            theirs.append(referee_slopes(judge, graph, removed, reader, writers, step))
    expected = np.concatenate(theirs)
    assert np.abs(expected).max() > 1e-3
    close(np.concatenate(ours), expected, 1e-6)


class PartlyRemoved(PatchedRun):
    """A run in which one reader reads less of one writer, by the hooks engine's own machinery."""

    edge: tuple[int, int]  # reader, writer
    share: float

    def _streams(self, readers: range, stream: Tensor, ablated: Tensor) -> Tensor | None:
        streams = super()._streams(readers, stream, ablated)
        reader, writer = self.edge
        if reader in readers:
            streams = (stream.expand(len(readers), *stream.shape) if streams is None else streams).clone()
            streams[reader - readers.start] -= self.share * self._differences[writer]  # which is a - c
        return streams


def metric_near(model: PAHQModel, task: Task, metric: str) -> Callable[..., float]:
    """The metric of a circuit in which one edge lacks another share."""
    patched = model.patched
    clean, corrupted = (capture(patched, task, ids) for ids in (task.clean_ids, task.corrupted_ids))
    measured = Metric(metric, task, clean.logits)
    room = torch.zeros(len(patched.graph.writers), *clean.embedding.shape, dtype=clean.embedding.dtype)

    def at(removed: BoolArray, reader: int, writer: int, share: float) -> float:
        run = PartlyRemoved(patched, corrupted, removed, room)
        run.edge, run.share = (reader, writer), share
        with hooks(*run.register()):
            return measured(answer_logits(patched, task, task.clean_ids))

    return at


@pytest.mark.parametrize("family", quick(IN_FLOAT64, *QUICK_FAMILIES))
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_slopes(kind: str, family: str) -> None:
    model = PAHQModel(ALL_FAMILIES[family](dtype=torch.float64), FP32)
    engine, metric = engine_of(kind, model, "logit_diff"), metric_near(model, LEFT, "logit_diff")
    graph = engine.graph
    kept = random_edges(graph, 0.8, seed=2)
    engine.begin(kept)
    # Parts of them are float32.
    float32 = ("mixtral", "cohere", "cohere_qk", "cohere2", "ernie4_5", "gptj")
    rounds = "moe" in family or family in float32
    step = 1e-3 if rounds else 1e-5  # small enough that no token changes its experts
    ours, theirs = [], []
    for reader in some_readers(graph):
        candidates, writers = some_candidates(graph, reader)[:2], list(graph.in_edges(reader))[::3]
        ours.append(engine.slopes(reader, candidates, writers).effects.flatten())
        for gone in candidates:
            removed = removed_by(graph, kept, reader, gone)
            ends = np.array([[metric(removed, reader, w, s) for w in writers] for s in (step, -step)])
            theirs.append((ends[0] - ends[1]) / (2 * step))
    expected = np.concatenate(theirs)
    assert np.abs(expected).max() > 1e-3
    close(np.concatenate(ours), expected, 1e-3 if rounds else 1e-6)


@pytest.mark.parametrize("name", quick(ALL_GRAPHS, "gpt2", "llama_split", "gemma2"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_slope_of_kl_at_the_full_model_is_zero(kind: str, name: str) -> None:
    engine = engine_of(kind, wrapped(name, dtype=torch.float64), "kl")
    for reader in range(len(engine.graph.readers)):
        slopes = engine.slopes(reader, [()], list(engine.graph.in_edges(reader)))
        assert abs(slopes.trial.values[0]) < 1e-14 and np.abs(slopes.effects).max() < 1e-12


# -- linear paths ------------------------------------------------------------------------------------------


@cache
def without_norms() -> PAHQModel:
    """A GPT-2 whose last layer's values and whose output are read without norms."""
    hf = tiny_gpt2(dtype=torch.float64)
    hf.transformer.ln_f = nn.Identity()
    hf.transformer.h[-1].ln_1 = nn.Identity()
    hf.transformer.h[-1].mlp.c_proj.weight.data.zero_()  # nothing but the direct path follows the heads
    return PAHQModel(hf, FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_exact_scores_on_linear_paths(kind: str) -> None:
    engine = engine_of(kind, without_norms(), "logit_diff")
    graph = engine.graph
    engine.begin(random_edges(graph, 0.7, seed=3))
    largest = 0.0
    for reader in (graph.logits_reader, *graph.layer_readers(graph.spec.layers - 1, "v")):
        edges = list(graph.in_edges(reader))
        for gone in some_candidates(graph, reader):
            effects = engine.slopes(reader, [gone], edges).effects[0]
            others = [sorted({*gone} ^ {writer}) for writer in edges]  # without it, or with it back
            changes = np.array(engine.try_(reader, others).values) - engine.try_(reader, [gone]).values
            signs = np.where(np.isin(edges, gone), -1, 1)
            np.testing.assert_allclose(effects, signs * changes, atol=1e-12)
            largest = max(largest, np.abs(effects).max())
    assert largest > 0.1


# -- what a call leaves behind -----------------------------------------------------------------------------


def graphs_alive() -> int:
    """Tensors that a backward pass could start from."""
    gc.collect()
    return sum(type(thing) is Tensor and thing.grad_fn is not None for thing in gc.get_objects())


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", ["llama_split", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_slopes_change_nothing(kind: str, name: str, regime: str) -> None:
    """Values are those of trials; trials and slopes before and after are the same bits."""
    engine = engine_of(kind, wrapped(name, regime=regime), "kl")
    graph = engine.graph
    engine.begin(random_edges(graph, 0.7, seed=4))
    alive = graphs_alive()
    for reader in some_readers(graph):
        candidates, writers = some_candidates(graph, reader), list(graph.in_edges(reader))
        turned = engine.slopes(reader, candidates, writers)  # by itself
        engine.focus(reader)
        before = engine.try_(reader, candidates)
        counted = engine.evaluations
        slopes = engine.slopes(reader, candidates, writers)
        assert engine.evaluations == counted + len(candidates)
        assert slopes.trial.candidates == before.candidates
        assert slopes.trial.values == pytest.approx(before.values, rel=1e-6, abs=1e-7)
        assert engine.try_(reader, candidates) == before
        again = engine.slopes(reader, candidates, writers)
        for other in (turned, again):
            assert np.array_equal(other.effects, slopes.effects) and other.trial == slopes.trial
        alone = engine.slopes(reader, candidates[1:2], writers[::2])
        close(alone.effects, slopes.effects[1:2, ::2], 1e-5)
        assert engine.slopes(reader, candidates, []).effects.shape == (len(candidates), 0)
        engine.accept(slopes.trial, 1)
        after = engine.try_(reader, candidates[1:2])
        assert after.values == pytest.approx(before.values[1:2], rel=1e-5, abs=1e-6)
    assert graphs_alive() == alive
    engine.finish()


@pytest.mark.parametrize("regime", quick(REGIMES, "pahq"))
def test_effects_do_not_depend_on_how_many_examples_run_at_once(
    regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on memory running out on the way."""
    model = wrapped("llama", regime=regime, compute="fp32")

    def effects() -> NDArray[np.float64]:
        engine = engine_of("hooks", model, "nll")
        reader = engine.graph.layer_readers(1, "k")[0]
        found = engine.slopes(reader, [[], [0, 3]], list(engine.graph.in_edges(reader))).effects
        engine.finish()
        return found

    whole = effects()
    monkeypatch.setattr(passes, "BUFFER_BYTES", 1)  # one example at a time
    close(effects(), whole, 1e-4)
    monkeypatch.undo()
    run, sizes = ProbedRun.effects, list[int]()

    def only_one(self: ProbedRun, task: Task, *rest: Any) -> Tensor:
        sizes.append(len(task))
        if len(task) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, task, *rest)

    monkeypatch.setattr(ProbedRun, "effects", only_one)
    close(effects(), whole, 1e-4)
    assert sizes == [3, *[1] * (2 * 3)]


@pytest.mark.parametrize(("says_so", "hint"), [(True, "such as kl$"), (False, "say differentiable=False")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_without_a_gradient_is_refused(
    kind: str, says_so: bool, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {name: find_metric(name) for name in known_metrics()}
    monkeypatch.setattr("pahq_hf.tasks.metrics._METRICS", names)  # what is registered ends with the test
    spec = MetricSpec("rank", lambda logits, _: (logits > 0).double().sum(-1), differentiable=not says_so)
    register_metric(spec)
    engine = engine_of(kind, wrapped("gpt2"), "rank")
    engine.try_(0, [[0]])
    counted = engine.evaluations
    with pytest.raises(MetricError, match=rf"^metric rank has no gradient.*{hint}"):
        engine.slopes(0, [[0]], [0])
    if says_so:
        assert engine.evaluations == counted


# -- what is kept from one reader to the next --------------------------------------------------------------


@pytest.mark.parametrize("regime", ["fp32", "pahq", "rtn"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "olmo2_split"])
def test_slopes_are_the_same_whichever_reader_was_before(name: str, regime: str) -> None:
    """What edges carry is kept for readers that read fewer writers; where a circuit changed it, it is not."""
    model = wrapped(name, regime=regime, compute="fp32")
    engine = engine_of("sparse", model, "nll")
    graph = engine.graph
    circuits = graph.all_edges, random_edges(graph, 0.8, seed=8)
    readers = graph.logits_reader, *reversed(some_readers(graph, 1)), *some_readers(graph, 0)[1:]
    for reader, kept in product(readers, circuits):
        fresh = engine_of("sparse", model, "nll")
        writers, candidates = list(graph.in_edges(reader)), some_candidates(graph, reader)[:2]
        found = []
        for one in (engine, fresh):
            one.begin(kept)
            found.append(one.slopes(reader, candidates, writers))
        fresh.finish()
        assert np.array_equal(found[0].effects, found[1].effects)
        assert np.array_equal(found[0].sizes, found[1].sizes)
        assert found[0].trial == found[1].trial


@pytest.mark.parametrize("metric", ["kl", "nll"])
def test_slopes_are_the_same_with_room_for_fewer_packed_unembeddings(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = wrapped("llama"), []
    for copies in (0, 1, 2):
        monkeypatch.setattr(MemoryBudget, "vocabulary_copies", copies)
        engine = engine_of("sparse", model, metric)
        reader = engine.graph.layer_readers(1, "mlp")[0]
        candidates, writers = some_candidates(engine.graph, reader), list(engine.graph.in_edges(reader))
        found.append(engine.slopes(reader, candidates, writers))
        engine.finish()
    assert np.abs(found[0].effects).max() > 1e-3
    for other in found[1:]:
        close(other.effects, found[0].effects, 1e-5)
        assert other.trial.values == pytest.approx(found[0].trial.values, rel=1e-6)
