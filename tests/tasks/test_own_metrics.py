"""The registry of metrics: one's own works everywhere, an unknown name nowhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pahq_hf import (
    ACDCConfig,
    AttributionConfig,
    Circuit,
    EngineConfig,
    MetricSpec,
    PAHQModel,
    load_task,
    register_metric,
)
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import ConfigError, MetricError, PAHQError
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.loading import TASKS
from pahq_hf.tasks.metrics import Metric, default_metric, find_metric, known_metrics
from pahq_hf.tasks.targets import FinalStream, Targets
from tests.families import ALL_FAMILIES
from tests.helpers import FP32, run_main
from tests.models import random_task, tiny_llama
from tests.tasks.test_metrics import make_task

BUILT_IN = known_metrics()


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers ends with it."""
    monkeypatch.setattr(
        "pahq_hf.tasks.metrics._METRICS", {name: find_metric(name) for name in known_metrics()}
    )
    yield


def miss(logits: Tensor, targets: Targets) -> Tensor:
    """How far the answer is behind the most probable token. [..., rows, vocab] -> [..., rows]"""
    right = targets.answers.mean(targets.answers.gather(logits))
    return logits.logsumexp(-1) - right


def miss_of_stream(stream: FinalStream, targets: Targets) -> Tensor:
    """The same. [batch, rows]"""
    return stream.logsumexp() - targets.answers.mean(stream.columns(targets.answers))


MISS = MetricSpec("miss", miss, needs=("answers",))


# -- the final stream says what logits say ------------------------------------------------------------


@pytest.mark.crossing
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "cohere"])
@pytest.mark.parametrize("name", [*BUILT_IN, "miss", "miss-of-stream"])
def test_both_engines_say_the_same(family: str, name: str) -> None:
    register_metric(MISS)
    register_metric(replace(MISS, name="miss-of-stream", from_stream=miss_of_stream))
    model = PatchedModel(ALL_FAMILIES[family]())
    task = random_task(model.hf.config.vocab_size, 3, 7, rows=2, seed=1)
    hooks, sparse = HooksEngine(model, task, name), SparseEngine(model, task, name)
    for kept in (model.graph.all_edges, model.graph.no_edges()):
        assert sparse.metric_of(kept) == pytest.approx(hooks.metric_of(kept), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["nll", "match_nll"])
def test_an_answer_far_out_of_reach_has_its_likelihood_in_both_engines(name: str) -> None:
    """exp(-745) is 0 in float64: the log of the answer's probability must not be taken that way."""
    hf = tiny_llama()
    hf.lm_head.weight.data *= 500
    model = PatchedModel(hf)
    task = random_task(hf.config.vocab_size, 2, 6, seed=2)
    logits = hf(task.clean_ids).logits[task.answer_rows, task.answer_positions].detach().double()
    worst = logits.topk(2, largest=False).indices.tolist()
    task = replace(task, answers=tuple(map(tuple, worst)))
    log_p = logits.log_softmax(-1)
    expected = -float(log_p.gather(-1, torch.tensor(worst)).logsumexp(-1).mean())
    assert expected > 1000
    for engine in (HooksEngine(model, task, name), SparseEngine(model, task, name)):
        assert engine.begin(model.graph.all_edges.copy()) == pytest.approx(expected, rel=1e-5)


# -- one's own ----------------------------------------------------------------------------------------


def test_a_metric_of_ones_own_is_searched_in_both_engines_and_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_metric(MISS)
    model = PAHQModel.from_pretrained("demo", FP32)
    task = load_task("ioi", model.tokenizer, n=3, metric="miss")
    options: dict[str, Any] = {"threshold": 0.05, "readers": "logits,m3", "progress": False}
    found = model.discover(task, **options)
    slow = model.discover(task, engine=EngineConfig(engine="hooks"), **options)
    assert np.array_equal(found.kept, slow.kept) and 0 < found.edge_count < model.graph.edge_count
    assert found.scores == pytest.approx(slow.scores, abs=1e-5)
    assert found.verified and found.discovery["metric"]["name"] == "miss"
    by_gradient = model.attribute(task, method="eap", topn=20, progress=False)
    assert by_gradient.edge_count == 20

    run = ("demo", "--task", "ioi", "--n", "3", "--metric", "miss", "--precision", "fp32")
    out = tmp_path / "run"
    less = ("--readers", "logits,m3", "--threshold", "0.05")
    assert run_main("discover", *run, *less, "--out", str(out)) == 0
    assert Circuit.from_pretrained(out).edges == found.edges
    capsys.readouterr()
    assert run_main("evaluate", str(out), "--model", "demo", "--task", "ioi", "--n", "3", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["metric"]["name"] == "miss"
    assert facts["metric"]["value"] == pytest.approx(found.discovery["metric"]["fp32"], abs=1e-6)
    nll = ("--metric", "nll", "--json")
    assert run_main("evaluate", str(out), "--model", "demo", "--task", "ioi", "--n", "3", *nll) == 0
    # One answer a row: the same number by another way.
    assert json.loads(capsys.readouterr().out)["metric"]["value"] == pytest.approx(facts["metric"]["value"])


def gap_to_the_top(logits: Tensor) -> Tensor:
    """Of one run, and knowing nothing of several. [rows, vocab] -> [rows]"""
    assert logits.ndim == 2
    return logits[:, :9].logsumexp(1) - logits[:, 3]


def nll(logits: Tensor, targets: Targets) -> Tensor:
    """Called as one of the package's. [rows, vocab] -> [rows]"""
    assert logits.ndim == 2
    return miss(logits, targets)


def test_a_run_is_not_continued_with_another_lambda(tmp_path: Path) -> None:
    model, task = PAHQModel(tiny_llama(), FP32), random_task(batch=2, seed=3)
    options: dict[str, Any] = {
        "threshold": 0.05,
        "readers": "logits",
        "progress": False,
        "out": tmp_path / "run",
    }
    model.discover(task, metric=lambda logits: -logits[:, 0], **options)
    model.discover(task, metric=lambda logits: -logits[:, 0], resume=True, **options)
    with pytest.raises(PAHQError, match="metric"):
        model.discover(task, metric=lambda logits: logits[:, 1] * 3, resume=True, **options)


def test_what_a_metric_does_to_its_logits_is_its_own_affair() -> None:
    """Two lines that should do the same: the other metrics of an evaluation see the model's logits."""

    def careless(logits: Tensor) -> Tensor:
        logits[:, :5] = -1e3
        return -logits.logsumexp(-1)

    def careful(logits: Tensor) -> Tensor:
        return careless(logits.clone())

    model, task = PAHQModel(tiny_llama(), FP32), random_task(batch=2, seed=3)
    options: dict[str, Any] = {"threshold": 0.05, "readers": "logits", "progress": False}
    circuits = [model.discover(task, metric=own, **options) for own in (careless, careful)]
    assert np.array_equal(circuits[0].kept, circuits[1].kept)
    facts = [model.evaluate(circuits[0], task, metric=own) for own in (careless, careful)]
    assert facts[0]["kl"] == facts[1]["kl"] and facts[0]["metric"]["full"] == facts[1]["metric"]["full"]


@pytest.mark.parametrize(
    "own", [gap_to_the_top, nll, lambda logits: logits[:, :9].logsumexp(1) - logits[:, 3]]
)
def test_a_function_of_logits_is_a_metric(own: Any) -> None:
    """In searches, attribution and evaluation, in both engines, by a name of its own."""
    model, task = PAHQModel(tiny_llama(), FP32), random_task(batch=2, seed=3)
    options: dict[str, Any] = {"threshold": 0.05, "readers": "logits,m1", "progress": False}
    found = model.discover(task, metric=own, **options)
    slow = model.discover(task, metric=own, engine=EngineConfig(engine="hooks"), **options)
    assert np.array_equal(found.kept, slow.kept) and 0 < found.edge_count < model.graph.edge_count
    name = str(found.discovery["metric"]["name"])
    told = {"gap_to_the_top": "gap_to_the_top", "nll": "own-nll"}.get(own.__name__, "lambda-[0-9a-f]{8}")
    assert re.fullmatch(told, name) and name in known_metrics()
    with torch.no_grad():
        logits = model(task.clean_ids).logits[task.answer_rows, task.answer_positions].double()
    full = float(Metric(name, task).rows(logits).mean())
    facts = model.evaluate(found, task, metric=own)
    assert facts["metric"]["name"] == name and facts["metric"]["full"] == pytest.approx(full, abs=1e-5)
    assert facts["metric"] == model.evaluate(found, task)["metric"]  # the circuit's own, by its name
    assert model.attribute(task, method="eap", metric=own, topn=20, progress=False).edge_count == 20
    by_name = model.discover(replace(task, metric=name), **options)
    assert np.array_equal(by_name.kept, found.kept)


@pytest.mark.parametrize(
    ("own", "match"),
    [
        (lambda: 0, "a function of logits, or of logits and targets"),
        (lambda logits, targets, more: 0, "a function of logits, or of logits and targets"),
        (lambda logits: logits, "one a row is"),
        (lambda logits: logits.mean(), "one a row is"),
        (lambda logits: 1.0, "must give a tensor"),
        (3, "metric must be one of|name or a function"),
    ],
)
def test_what_is_no_function_of_logits_is_refused(own: Any, match: str) -> None:
    model, task = PAHQModel(tiny_llama(), FP32), random_task(batch=2, seed=3)
    for work in (
        lambda: model.discover(task, metric=own, threshold=0.1, progress=False),
        lambda: model.evaluate(Circuit(model.graph, *[model.graph.no_edges()] * 3), task, metric=own),
    ):
        with pytest.raises((ConfigError, MetricError), match=match):
            work()


def test_a_circuit_of_an_unknown_metric_is_shown_and_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process where nobody registered it."""
    with monkeypatch.context() as patch:
        patch.setattr("pahq_hf.tasks.metrics._METRICS", {name: find_metric(name) for name in BUILT_IN})
        register_metric(MISS)
        run = ("demo", "--task", "ioi", "--n", "2", "--metric", "miss", "--precision", "fp32")
        assert run_main("discover", *run, "--readers", "logits", "--out", str(tmp_path / "run")) == 0
    capsys.readouterr()
    assert run_main("show", str(tmp_path / "run")) == 0
    assert "miss" in capsys.readouterr().out
    assert run_main("evaluate", str(tmp_path / "run"), "--model", "demo", "--task", "ioi", "--n", "2") == 2
    err = capsys.readouterr().err
    assert "unknown metric 'miss'" in err and "register_metric" in err and "Traceback" not in err


def test_rounding_of_ones_own_is_its_gradients() -> None:
    register_metric(MISS)
    metric = Metric("miss", make_task([0, 1], ((0,), (1, 2)), ((), ())))
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = 1e-6
    at = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(metric.reduce(metric.rows(at)), at)
    moved = metric(logits + error * gradient.sign()) - metric(logits)
    assert metric.rounding(logits, metric(logits), error) == pytest.approx(moved, rel=1e-4)
    register_metric(replace(MISS, name="bounded", rounding=lambda value, error: 7 * error))
    assert Metric("bounded", make_task([0], ((0,),), ((),))).rounding(logits, 1.0, 2.0) == 14


def test_a_metric_that_may_be_registered_again_is_the_last_one() -> None:
    register_metric(MISS)
    register_metric(replace(MISS, needs=()))
    assert find_metric("miss").needs == () and known_metrics() == [*BUILT_IN, "miss"]


# -- what is no metric --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(MISS, name="kl"), "metric 'kl' is built in: give yours another name"),
        (replace(MISS, name="My metric"), "lower case letters, digits, _ and -; got 'My metric'"),
        (replace(MISS, name=""), "got ''"),
        (replace(MISS, tasks=("ioi",)), "task 'ioi' is usually scored with 'kl'"),
        (replace(MISS, value=None), "needs a function of logits and targets"),  # type: ignore[arg-type]
        (replace(MISS, needs=("answer",)), "cannot need 'answer': did you mean 'answers'?"),  # type: ignore[arg-type]
        (replace(MISS, needs=("gold",)), "cannot need 'gold': it can need answers, distractors, reference"),  # type: ignore[arg-type]
        (replace(MISS, needs="answers"), "needs is a tuple of names; got str: 'answers'"),  # type: ignore[arg-type]
        (replace(MISS, tasks="ioi"), "tasks is a tuple of names; got str: 'ioi'"),  # type: ignore[arg-type]
        (replace(MISS, from_stream=3), "a function or None as from_stream; got int: 3"),  # type: ignore[arg-type]
        (replace(MISS, rounding=0.1), "a function or None as rounding; got float: 0.1"),  # type: ignore[arg-type]
        (replace(MISS, differentiable="no"), "differentiable is True or False; got 'no'"),  # type: ignore[arg-type]
        (miss, "register_metric takes a MetricSpec; got function"),
    ],
)
def test_what_cannot_be_registered(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_metric(spec)
    assert known_metrics() == BUILT_IN


def test_a_metric_of_the_wrong_shape_says_so() -> None:
    register_metric(replace(MISS, value=lambda logits, targets: logits.sum()))
    with pytest.raises(MetricError, match=r"metric miss gives values of shape \(\); one a row is \(2,\)"):
        Metric("miss", make_task([0, 1], ((0,), (1,)), ((), ())))(torch.zeros(2, 4))


def test_a_metric_that_compares_with_the_full_model_and_does_not_say_so() -> None:
    def apart(logits: Tensor, targets: Targets) -> Tensor:
        return (logits - targets.reference).abs().amax(-1)

    register_metric(MetricSpec("apart", apart))
    with pytest.raises(MetricError, match=r"says so where it is registered: needs=\('reference',\)"):
        Metric("apart", make_task([0, 1], ((0,), (1,)), ((), ())), torch.zeros(2, 4))(torch.zeros(2, 4))


def test_methods_refuse_a_metric_without_a_gradient() -> None:
    def wrong(logits: Tensor, targets: Targets) -> Tensor:
        return (logits.argmax(-1) != targets.answers.ids[:, 0]).double()

    register_metric(MetricSpec("wrong", wrong, needs=("answers",), differentiable=False))
    model = PAHQModel.from_pretrained("demo", FP32)
    task = load_task("ioi", model.tokenizer, n=2, metric="wrong")
    for method in ("eap", "eap-ig", "hisp"):
        with pytest.raises(MetricError, match=f"{method} cannot use wrong, which has no gradient; use exact"):
            model.attribute(task, method=method, topn=3, progress=False)
    assert model.attribute(task, method="exact", topn=3, progress=False).edge_count == 3


def test_a_metric_that_is_wrong_about_its_gradient_is_searched_and_not_followed() -> None:
    """A search of hours must not end in its last check."""

    def wrong(logits: Tensor, targets: Targets) -> Tensor:
        return (logits.argmax(-1) != targets.answers.ids[:, 0]).double()

    register_metric(MetricSpec("wrong", wrong, needs=("answers",)))
    model = PAHQModel.from_pretrained("demo", FP32)
    task = load_task("ioi", model.tokenizer, n=2, metric="wrong")
    assert model.discover(task, threshold=0.1, readers="logits", progress=False).verified
    with pytest.raises(MetricError, match=r"metric wrong has no gradient, .* say differentiable=False"):
        model.attribute(task, method="eap-ig", topn=3, progress=False)


@pytest.mark.parametrize("command", ["discover", "attribute", "sweep", "evaluate"])
def test_an_unknown_name_ends_a_command_before_a_model_is_loaded(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "discover": ("nowhere", "--out", str(tmp_path / "run")),
        "attribute": ("nowhere", "--topn", "3", "--out", str(tmp_path / "run")),
        "sweep": ("nowhere", "--thresholds", "0.1", "--out", str(tmp_path / "run")),
        "evaluate": ("nowhere", "--model", "nowhere"),
    }[command]
    assert run_main(command, *arguments, "--task", "ioi", "--metric", "loss") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "--metric" in err and "unknown metric 'loss'; known: kl, logit_diff, nll" in err
    assert not (tmp_path / "run").exists()


def test_an_unknown_name_is_an_error_everywhere() -> None:
    message = f"unknown metric 'loss'; known: {', '.join(BUILT_IN)}; or add it with"
    model = PAHQModel.from_pretrained("demo", FP32)
    task = load_task("ioi", model.tokenizer, n=2)
    with pytest.raises(MetricError, match=message):
        replace(task, metric="loss")
    with pytest.raises(MetricError, match=message):
        load_task("ioi", model.tokenizer, n=2, metric="loss")
    with pytest.raises(ConfigError, match=r"metric must be one of kl, .*; got 'loss'"):
        ACDCConfig(metric="loss")
    with pytest.raises(ConfigError, match=r"metric must be one of kl, .*; got 'loss'"):
        AttributionConfig(metric="loss")
    kept = model.graph.all_edges.copy()
    circuit = Circuit(model.graph, kept, np.zeros(kept.shape), kept)
    with pytest.raises(MetricError, match=message):
        model.evaluate(circuit, task, metric="loss")
    for engine in (HooksEngine, SparseEngine):
        with pytest.raises(MetricError, match=message):
            engine(model.patched, task, "loss")
    with pytest.raises(MetricError, match=r"unknown metric \['kl'\]"):
        find_metric(["kl"])  # type: ignore[arg-type]


def test_every_generated_task_has_its_usual_metric(capsys: pytest.CaptureFixture[str]) -> None:
    usual = {
        "ioi": "kl",
        "greater_than": "prob_diff",
        "docstring": "logit_diff",
        "induction": "match_nll",
        "gendered_pronoun": "logit_diff",
        "sva": "logit_diff",
    }
    assert {name: default_metric(name) for name in TASKS} == usual
    assert default_metric("data.csv") == "kl"
    assert run_main("tasks", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["tasks"]
    assert {row["name"]: row["metric"] for row in rows} == usual
    tokenizer = PAHQModel.from_pretrained("demo", FP32).tokenizer
    for name in ("ioi", "greater_than", "induction", "gendered_pronoun", "sva"):
        assert load_task(name, tokenizer, n=2).metric == usual[name]


@pytest.mark.parametrize("command", ["discover", "attribute", "sweep", "evaluate"])
def test_help_names_every_built_in_metric(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(command, "--help") == 0
    shown = "".join(c for c in capsys.readouterr().out if c.isalnum() or c in "_,")
    assert ",".join(BUILT_IN) in shown


def test_estimates_need_a_gradient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(logits: Tensor, targets: Targets) -> Tensor:
        return (logits.argmax(-1) != targets.answers.ids[:, 0]).double()

    register_metric(MetricSpec("wrong", wrong, needs=("answers",), differentiable=False))
    command = ["discover", "demo", "--task", "ioi", "--n", "2", "--metric", "wrong", "--tests", "verified"]
    assert run_main(*command, "--out", str(tmp_path / "out")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "pahq: metric wrong has no gradient, which estimates follow: use tests all"
    assert not (tmp_path / "out").exists()
