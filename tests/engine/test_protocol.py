"""The protocol of engines: whatever order its calls come in, they mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.protocol import Engine, Trial
from pahq_hf.engine.setting import Setting
from tests.helpers import random_edges, wrapped
from tests.models import random_task
from tests.tiers import quick

pytestmark = pytest.mark.crossing

TASK = random_task(batch=3, length=6, padding="right", seed=17)
REGIMES = ("fp32", "pahq", "pahq-literal", "rtn")
KINDS = ("sparse", "hooks")
SLACK = 2e-6  # how far another order of sums may move a metric
EXACT = ("fp32", "pahq")  # whose current circuits and second looks are FP32
# Shrinking calls of models takes longer than reading them.
QUICK = tuple(phase for phase in Phase if phase is not Phase.shrink)


def new_engine(kind: Any, name: str, regime: str) -> Engine:
    model = wrapped(name, regime=regime)
    setting = Setting(model.patched, TASK, "logit_diff", "corrupted", model.pahq_config)
    return make_engine(setting, EngineConfig(kind))


@cache
def engine_of(kind: str, name: str, regime: str) -> Engine:
    """One that serves many examples, whatever they leave it at."""
    return new_engine(kind, name, regime)


@cache
def fresh_engine(kind: str, name: str, regime: str) -> Engine:
    """One that only ever begins and tries."""
    return new_engine(kind, name, regime)


def without(graph: Graph, kept: BoolArray, reader: int, gone: Sequence[int]) -> BoolArray:
    """The circuit with exactly these edges into a reader gone."""
    fewer = kept.copy()
    fewer[reader] = graph.all_edges[reader]
    fewer[reader, list(gone)] = False
    return fewer


def begun(engine: Engine, kept: BoolArray, reader: int, gone: Sequence[int]) -> float:
    """What an engine finds that knows of nothing but the circuit and the reader."""
    engine.begin(kept)
    return engine.try_(reader, [gone]).values[0]


class Step(NamedTuple):
    """A call, and the reader and edges that it is about."""

    call: str
    reader: int
    sets: list[tuple[int, ...]]


@st.composite
def steps(draw: st.DrawFn, graph: Graph) -> Step:
    calls = ["try", "try", "accept", "cut", "look", "focus", "begin", "finish", "metric_of", "each"]
    reader = draw(st.sampled_from([r for r in range(len(graph.readers)) if graph.prefix[r]]))
    writers = st.lists(st.sampled_from(list(graph.in_edges(reader))), unique=True).map(tuple)
    return Step(draw(st.sampled_from(calls)), reader, draw(st.lists(writers, min_size=1, max_size=3)))


def take(engine: Engine, step: Step, kept: BoolArray) -> BoolArray:
    """Make a call. Returns the circuit that is current then."""
    reader, sets = step.reader, step.sets
    if step.call == "try":
        engine.try_(reader, sets)
    elif step.call == "accept":
        trial = engine.try_(reader, sets)
        engine.accept(trial, len(sets) - 1)
        return without(engine.graph, kept, reader, sets[-1])
    elif step.call == "cut":
        engine.cut(reader, sets[0])
        return without(engine.graph, kept, reader, sets[0])
    elif step.call == "look":
        engine.look_again(reader, sets)
    elif step.call == "focus":
        engine.focus(reader)
    elif step.call == "begin":
        kept = without(engine.graph, kept, reader, sets[0])
        engine.begin(kept)
    elif step.call == "finish":
        engine.finish()
    elif step.call == "metric_of":
        engine.metric_of(without(engine.graph, kept, reader, sets[0]))
    else:
        few = engine.graph.no_edges()
        few[reader, list(sets[0])] = True  # a whole circuit would take the hooks engine long
        engine.drop_each(few)
        engine.add_each(kept & ~few, few)
    return kept


@pytest.mark.parametrize("regime", quick(REGIMES, "fp32", "pahq", "rtn"))
@pytest.mark.parametrize("kind", KINDS)
def test_after_any_calls_a_trial_is_that_of_a_fresh_engine(kind: str, regime: str) -> None:
    engine, fresh = (make(kind, "llama", regime) for make in (engine_of, fresh_engine))
    judge = fresh_engine("hooks", "llama", "fp32")
    graph = engine.graph

    @settings(max_examples=25 if kind == "sparse" else 8, phases=QUICK)
    @given(data=st.data(), share=st.sampled_from([0.4, 0.8, 1.0]), seed=st.integers(0, 999))
    def check(data: st.DataObject, share: float, seed: int) -> None:
        kept = random_edges(graph, share, seed)
        engine.begin(kept)
        for step in data.draw(st.lists(steps(graph), max_size=6)):
            kept = take(engine, step, kept)
        last = data.draw(steps(graph))
        trial = engine.try_(last.reader, last.sets)
        assert trial == Trial.of(last.reader, last.sets, trial.values)
        assert engine.try_(last.reader, last.sets) == trial  # to the bit
        if regime != "pahq":  # there rounding is relative to the circuit in which a reader came into focus
            expected = [begun(fresh, kept, last.reader, gone) for gone in trial.candidates]
            assert trial.values == pytest.approx(expected, abs=SLACK)
        looks = engine.look_again(last.reader, last.sets)
        exact = [judge.metric_of(without(graph, kept, last.reader, gone)) for gone in looks.candidates]
        if regime in EXACT:
            assert looks.values == pytest.approx(exact, abs=5e-6)
        engine.finish()

    check()


@pytest.mark.parametrize("regime", quick(REGIMES, "fp32", "pahq", "rtn"))
@pytest.mark.parametrize("kind", KINDS)
def test_an_accepted_trial_is_the_circuit_it_tried(kind: str, regime: str) -> None:
    """Also one that brings edges back, one from before other trials, and one that another engine made."""
    engine, fresh = (make(kind, "llama", regime) for make in (engine_of, fresh_engine))
    judge, graph = fresh_engine("hooks", "llama", "fp32"), engine.graph

    @settings(max_examples=15 if kind == "sparse" else 6, phases=QUICK)
    @given(data=st.data(), share=st.sampled_from([0.5, 1.0]), seed=st.integers(0, 999))
    def check(data: st.DataObject, share: float, seed: int) -> None:
        kept = random_edges(graph, share, seed)
        engine.begin(kept)
        first, other = data.draw(steps(graph)), data.draw(steps(graph))
        trial = engine.try_(first.reader, first.sets)
        k = data.draw(st.integers(0, len(first.sets) - 1))
        engine.accept(trial, k)
        straight = engine.try_(first.reader, first.sets)
        assert straight.values[k] == pytest.approx(trial.values[k], abs=2e-6)
        now = without(graph, kept, first.reader, trial.candidates[k])
        looks = engine.look_again(first.reader, first.sets)
        if regime in EXACT:
            exact = [judge.metric_of(without(graph, now, first.reader, gone)) for gone in looks.candidates]
            assert looks.values == pytest.approx(exact, abs=5e-6)
        if regime != "pahq":
            expected = [begun(fresh, now, first.reader, gone) for gone in straight.candidates]
            assert straight.values == pytest.approx(expected, abs=SLACK)
        # The same when it was not the last trial, nor this engine's own.
        foreign = Trial.of(first.reader, first.sets, [0.0] * len(first.sets))
        for late in (trial, foreign):
            engine.begin(kept)
            engine.focus(first.reader)
            engine.try_(first.reader, [()])
            engine.metric_of(random_edges(graph, 0.5, seed + 1))
            engine.accept(late, k)
            again = engine.try_(first.reader, first.sets)
            assert again == straight
        engine.cut(other.reader, other.sets[0])
        now = without(graph, now, other.reader, other.sets[0])
        value = engine.try_(first.reader, first.sets[:1]).values[0]
        if (
            regime != "pahq" or other.reader != first.reader
        ):  # another reader's cut makes it come into focus anew
            assert value == pytest.approx(begun(fresh, now, first.reader, first.sets[0]), abs=SLACK)

    check()


@pytest.mark.parametrize("regime", quick(REGIMES, "fp32", "pahq", "rtn"))
@pytest.mark.parametrize("kind", KINDS)
def test_measuring_spoils_nothing(kind: str, regime: str) -> None:
    engine = engine_of(kind, "llama", regime)
    graph = engine.graph

    @settings(max_examples=12 if kind == "sparse" else 3, phases=QUICK)
    @given(data=st.data(), share=st.sampled_from([0.5, 1.0]), seed=st.integers(0, 999))
    def check(data: st.DataObject, share: float, seed: int) -> None:
        kept = random_edges(graph, share, seed)
        engine.begin(kept)
        step, later = data.draw(steps(graph)), data.draw(steps(graph))
        trial = engine.try_(step.reader, step.sets)
        engine.accept(trial, 0)

        def found() -> list[Any]:
            return [
                engine.try_(step.reader, step.sets),
                engine.look_again(step.reader, step.sets),
                engine.focus(later.reader),
                engine.try_(later.reader, later.sets),
            ]

        expected = found()
        engine.begin(kept)
        engine.focus(step.reader)
        engine.accept(trial, 0)
        few = random_edges(graph, 0.1, seed + 1)
        effects = engine.drop_each(few)
        engine.metric_of(random_edges(graph, 0.7, seed + 2))
        assert found() == expected
        assert np.array_equal(engine.drop_each(few), effects)

    check()


@pytest.mark.parametrize("kind", quick(KINDS, "sparse"))
@pytest.mark.parametrize("name", quick(["gpt2", "llama_split", "gemma2"], "gpt2", "gemma2"))
def test_edges_that_come_back_leave_nothing_of_their_absence(name: str, kind: str) -> None:
    """Whatever reader is asked about next: what a node wrote without them is no part of what others read."""
    engine, fresh = (make(kind, name, "fp32") for make in (engine_of, fresh_engine))
    graph = engine.graph
    for first in range(graph.logits_reader):
        engine.begin(without(graph, graph.all_edges, first, graph.in_edges(first)))
        engine.try_(first, [()])
        engine.cut(first, ())
        for reader in sorted({first + 1, graph.logits_reader}):
            gone = graph.in_edges(reader)[:1]
            expected = begun(fresh, graph.all_edges, reader, gone)
            assert engine.try_(reader, [gone]).values == pytest.approx([expected], abs=SLACK), (first, reader)


@pytest.mark.parametrize("name", ["gpt2", "llama_split", "gemma2"])
def test_both_engines_answer_alike(name: str) -> None:
    sparse, hooks = (engine_of(kind, name, "fp32") for kind in KINDS)
    graph = sparse.graph

    @settings(max_examples=8, phases=QUICK)
    @given(data=st.data(), share=st.sampled_from([0.4, 0.9]), seed=st.integers(0, 999))
    def check(data: st.DataObject, share: float, seed: int) -> None:
        kept = random_edges(graph, share, seed)
        for engine in (sparse, hooks):
            engine.begin(kept)
        for _ in range(2):
            step = data.draw(steps(graph))
            k = data.draw(st.integers(0, len(step.sets) - 1))
            trials = [engine.try_(step.reader, step.sets) for engine in (sparse, hooks)]
            looks = [engine.look_again(step.reader, step.sets) for engine in (sparse, hooks)]
            for ours, theirs in (trials, looks):
                assert ours.values == pytest.approx(theirs.values, rel=1e-5, abs=1e-5)
            for engine, trial in zip((sparse, hooks), trials, strict=True):
                engine.accept(trial, k)

    check()
