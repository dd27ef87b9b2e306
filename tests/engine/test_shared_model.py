"""Engines that share a model: each answers as if it were alone, whatever the others are in the midst of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine, make_gradient_runs
from pahq_hf.engine.hooks.apply import applied
from pahq_hf.engine.protocol import Engine
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.applied import partner_of
from pahq_hf.evaluation.evaluator import Evaluator
from tests.families import ALL_FAMILIES
from tests.helpers import random_edges
from tests.models import random_task
from tests.tiers import quick

pytestmark = pytest.mark.crossing

TASK = random_task(batch=3, length=6, padding="right", seed=17)
REGIMES = ("fp32", "pahq", "pahq-literal", "rtn")
Answers = Iterator[Any]


def new_model(regime: Any) -> PAHQModel:
    """One that no other test has."""
    return PAHQModel(ALL_FAMILIES["llama"](), PAHQConfig(regime=regime))


def setting(model: PAHQModel) -> Setting:
    return Setting(model.patched, TASK, "logit_diff", "corrupted", model.pahq_config)


def at_search(model: PAHQModel, kind: Any, budget: int | None = None) -> Answers:
    """All that an engine answers to a search, call by call."""
    engine: Engine = make_engine(setting(model), EngineConfig(kind, memory_budget=budget))
    graph, kept = engine.graph, random_edges(engine.graph, 0.8, 3)
    yield engine.clean_logits
    yield engine.begin(kept)
    for name in ("m1", "a1.h2<q>", "m0", "a0.kv0<v>"):
        reader = graph.reader_index(name)
        writers = list(graph.in_edges(reader))
        yield engine.focus(reader)
        trial = engine.try_(reader, [writers[:k] for k in range(len(writers) + 1)])
        yield trial
        yield engine.metric_of(random_edges(graph, 0.5, 4))
        yield engine.try_(reader, trial.candidates)
        yield engine.look_again(reader, trial.candidates[:2])
        slopes = engine.slopes(reader, trial.candidates[:1], writers)
        yield slopes.trial, slopes.writers
        yield slopes.effects
        engine.accept(trial, 1)
        yield engine.try_(reader, [writers[:2]])
    yield engine.drop_each(random_edges(graph, 0.1, 5))
    yield engine.add_each(random_edges(graph, 0.6, 5), graph.all_edges & ~random_edges(graph, 0.9, 5))
    engine.finish()
    yield engine.begin(kept)


def at_evaluation(model: PAHQModel) -> Answers:
    """An evaluator's figures."""
    evaluator = Evaluator(model.patched, TASK, "logit_diff", "corrupted")
    kept = random_edges(model.graph, 0.2, 6)
    yield evaluator.full, evaluator.empty
    yield evaluator.logits(kept)
    yield evaluator.drop_effects(kept)
    yield evaluator.means
    yield evaluator.applied(kept, None, evaluator.means, 0.5)


def at_attribution(model: PAHQModel) -> Answers:
    """Gradients of readers, and what edges would carry."""
    runs = make_gradient_runs(setting(model))
    (part,) = runs.parts()
    gradients = runs.gradients(part, runs.clean.embedding)
    yield runs.clean.logits
    yield from (found for _, found in gradients.walk(part.real))
    yield from (differences for _, differences in runs.chunks(part))


def at_use(model: PAHQModel) -> Answers:
    """What a user computes, with a component in FP32, with none, and as a circuit."""
    ids = TASK.clean_ids
    yield model(ids).logits
    model.activate("a0.h1", "m1")
    yield model(ids).logits
    yield sorted(model.patched.precision.active)
    kept = random_edges(model.graph, 0.6, 7)
    with applied(model.patched, kept, partner_of(model.patched, TASK)):
        first = model(ids).logits
    yield first
    yield model(ids).logits
    model.deactivate()
    yield model(ids).logits


USERS: dict[str, Callable[[PAHQModel], Answers]] = {
    "sparse": lambda model: at_search(model, "sparse"),
    "another sparse": lambda model: at_search(model, "sparse", 60_000),
    "hooks": lambda model: at_search(model, "hooks"),
    "evaluation": at_evaluation,
    "attribution": at_attribution,
    "use": at_use,
}


@cache
def alone(user: str, regime: str) -> list[Any]:
    """What a user of a model that nobody shares is answered."""
    with torch.no_grad():
        return list(USERS[user](new_model(regime)))


def same(ours: Any, theirs: Any) -> bool:
    """Equal to the bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray):
        return np.array_equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return bool(ours == theirs)


@pytest.mark.parametrize("regime", quick(REGIMES, "pahq", "pahq-literal"))
@pytest.mark.parametrize("order", range(3))
def test_whoever_shares_a_model_is_answered_as_if_alone(regime: str, order: int) -> None:
    """To the bit, whoever came first and whose turn it is."""
    draw, model = np.random.default_rng(order), new_model(regime)
    users = {user: start(model) for user, start in USERS.items()}
    found: dict[str, list[Any]] = {user: [] for user in users}
    while users:
        user = str(draw.choice(sorted(users)))
        for answer in users[user]:
            expected = alone(user, regime)[len(found[user])]
            assert same(answer, expected), (user, len(found[user]))
            found[user].append(answer)
            break
        else:
            del users[user]
    assert {user: len(answers) for user, answers in found.items()} == {
        user: len(alone(user, regime)) for user in USERS
    }


@pytest.mark.parametrize("kind", ["sparse", "hooks"])
def test_inside_an_applied_circuit_engines_refuse(kind: Any) -> None:
    """Its hooks would be in their runs."""
    model = new_model("pahq")
    engine = make_engine(setting(model), EngineConfig(kind))
    everything, reader = engine.graph.all_edges, engine.graph.logits_reader
    expected = engine.begin(everything), engine.try_(reader, [[0]])
    calls: dict[str, Callable[[], object]] = {
        "begin": lambda: engine.begin(everything),
        "focus": lambda: engine.focus(reader),
        "try_": lambda: engine.try_(reader, [[0]]),
        "look_again": lambda: engine.look_again(reader, [[0]]),
        "slopes": lambda: engine.slopes(reader, [[0]], [0]),
        "metric_of": lambda: engine.metric_of(everything),
        "drop_each": lambda: engine.drop_each(everything),
        "add_each": lambda: engine.add_each(engine.graph.no_edges(), everything),
    }
    methods = {name for name, method in vars(Engine).items() if name[0] != "_" and callable(method)}
    assert methods == {*calls, "accept", "cut", "finish"}, "those three may but note down"
    with applied(model.patched, everything, partner_of(model.patched, TASK)):
        for call in calls.values():
            with pytest.raises(ConfigError, match="a circuit is applied"):
                call()
        engine.finish()
    assert (engine.begin(everything), engine.try_(reader, [[0]])) == expected


@pytest.mark.parametrize("regime", ["rtn", "pahq-literal"])
def test_what_a_user_has_in_fp32_is_no_part_of_a_search(regime: str) -> None:
    """And the search leaves it as it is."""
    plain, model = new_model(regime), new_model(regime)
    model.activate("m0", "a1.h3")
    before = model(TASK.clean_ids).logits
    options: dict[str, Any] = {"threshold": 0.02, "metric": "kl", "progress": False}
    ours, theirs = model.discover(TASK, **options), plain.discover(TASK, **options)
    assert np.array_equal(ours.scores, theirs.scores)
    assert ours.discovery["metric"] == theirs.discovery["metric"]
    assert model.patched.precision.active == {"m0", "a1.h3"}
    assert torch.equal(model(TASK.clean_ids).logits, before)
