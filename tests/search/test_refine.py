"""The search `refine`: what it finds, by whichever engine, and after whatever interruption."""

from __future__ import annotations

import json
import re
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.circuit.graph import BoolArray, Graph, GraphSpec, edge_list
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_circuit_runs, make_engine
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError, MetricError, RunError
from pahq_hf.search.attribution.methods import Scores
from pahq_hf.search.learning import Schedule
from pahq_hf.search.minibatches import Minibatch
from pahq_hf.search.pruning import Pruned
from pahq_hf.search.rounds import GAIN, Scale, changed
from pahq_hf.search.units import Edges
from pahq_hf.tasks.metrics import MetricSpec, find_metric, known_metrics, register_metric
from tests.helpers import assert_same_circuit, files_of, interrupted_after, run_main, wrapped
from tests.models import random_task
from tests.tiers import examples, exhaustive, quick

TASK = random_task(batch=4, seed=21, metric="kl")
OPTIONS: dict[str, Any] = {"search": "refine", "edges": 6, "steps": 3, "minibatch": 2, "progress": False}


def small(**options: Any) -> PAHQModel:
    """A model of one layer, whose circuits are few."""
    return wrapped("gpt2", layers=1, **options)


def refined(model: PAHQModel, out: Path | None = None, **options: Any) -> Circuit:
    return model.discover(TASK, out=out, **(OPTIONS | options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine") / "run"
    refined(small(), folder)
    return folder


def test_a_circuit_of_the_size_is_measured_by_the_hooks_engine(finished: Path) -> None:
    circuit = Circuit.from_pretrained(finished)
    graph = circuit.graph
    assert circuit.verified and 0 < circuit.edge_count <= 6
    assert (graph.live_edges(circuit.kept) == circuit.kept).all()
    # Scores rank all edges, those of the circuit first.
    scores = circuit.scores[graph.all_edges]
    assert len(np.unique(scores)) == graph.edge_count and scores.min() > 0 and scores.max() == 1
    assert circuit.scores[circuit.kept].min() > circuit.scores[graph.all_edges & ~circuit.kept].max()


def test_no_swap_of_two_edges_brings_it_nearer() -> None:
    """By brute force: of the best additions, each for the edge that is worth least then."""
    model = small()
    circuit = refined(model)
    engine = make_engine(Setting(model.patched, TASK, "kl", "corrupted", model.pahq_config), EngineConfig())
    graph, kept = circuit.graph, circuit.kept
    gap, empty = engine.metric_of(kept), engine.metric_of(graph.no_edges())
    additions = [changed(kept, (), [edge]) for edge in edge_list(graph.all_edges & ~kept)]
    assert len(additions) > 10
    for more in sorted(additions, key=engine.metric_of)[:16]:
        effects = engine.drop_each(more)
        least = min(edge_list(more), key=lambda edge: abs(effects[edge]))
        assert engine.metric_of(changed(more, [least], ())) > gap - 3 * GAIN * empty


@pytest.mark.parametrize("kind", ["right", "random", "opposite", "nothing", "nan"])
def test_slopes_only_say_where_to_look_first(kind: str) -> None:
    """Whatever they say, where it ends no edge of the circuit can go, alone, and bring it nearer."""
    model = small()
    setting = Setting(model.patched, TASK, "kl", "corrupted", model.pahq_config)
    engine, graph = make_engine(setting, EngineConfig()), model.patched.graph
    pairs = Minibatch.of(make_circuit_runs(setting))
    random = np.random.default_rng(0)

    def estimate(kept: BoolArray) -> Scores:
        right = pairs.at_circuit(kept.astype(float))[1]
        other = random.normal(size=right.shape)
        wrong = {"random": other, "opposite": -right, "nothing": 0 * right, "nan": np.nan * right}
        return wrong.get(kind, right)

    everything = graph.all_edges.copy()
    scale = Scale.of(engine, Edges(graph))
    circuit = Pruned(engine, scale, everything, engine.metric_of(everything), estimate)
    for _ in chain(circuit.to_size(8), circuit.at_size(8)):
        assert (graph.live_edges(circuit.kept) == circuit.kept).all()
    assert circuit.size <= 8 and circuit.metric == pytest.approx(engine.metric_of(circuit.kept))
    alone = [engine.metric_of(changed(circuit.kept, [edge], ())) for edge in edge_list(circuit.kept)]
    assert min(alone) > circuit.metric - 2 * GAIN * scale.whole


@pytest.mark.parametrize("regime", quick(["fp32", "pahq", "rtn", "pahq-literal"], "fp32", "pahq"))
def test_both_engines_find_it(regime: Any) -> None:
    model = small(regime=regime)
    found = [refined(model, engine=EngineConfig(engine)) for engine in ("sparse", "hooks")]
    assert all(circuit.verified and circuit.edge_count <= 6 for circuit in found)
    if regime == "fp32":
        assert (found[0].kept == found[1].kept).all()


@pytest.mark.parametrize(
    ("threshold", "options"), [(0.05, {"steps": 2}), exhaustive(0.05, {}), exhaustive(0.0001, {})]
)
def test_on_the_demo_it_is_nearer_than_acdc_and_attribution_at_equal_size(
    threshold: float, options: dict[str, Any]
) -> None:
    """Near the full model, too, where learning a part of so few edges lost more than ACDC's tests."""
    model = PAHQModel.from_pretrained("demo", precision="fp32")
    task = load_task("ioi", model.tokenizer, n=8, metric="kl")
    acdc = model.discover(task, threshold=threshold, progress=False)
    others = [acdc, model.attribute(task, method="eap-ig", topn=acdc.edge_count, progress=False)]
    ours = model.discover(task, search="refine", edges=acdc.edge_count, progress=False, **options)
    assert ours.edge_count <= acdc.edge_count
    gaps = [circuit.record.metric.final for circuit in (ours, *others)]
    assert gaps[0] <= min(gaps[1:])


@pytest.mark.parametrize("steps", quick([1, 2, 3, 5], 2, 5))
def test_an_interrupted_run_ends_where_another_does(finished: Path, tmp_path: Path, steps: int) -> None:
    """After a level of learning, and after a round of removals; and killed just before a step is kept."""
    with interrupted_after(steps):
        refined(small(), tmp_path)
    circuit = refined(small(), tmp_path, resume=True)
    assert_same_circuit(circuit, Circuit.from_pretrained(finished))
    for name in ("circuit.json", "scores.safetensors", "journal.jsonl", "learned.safetensors"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize(
    ("metric", "ablation", "edges"), [("nll", "zero", 6), ("logit_diff", "corrupted", 3)]
)
def test_no_edge_is_in_the_way(metric: str, ablation: Any, edges: int) -> None:
    """Nor is no circuit at all better."""
    model = small()
    circuit = refined(model, metric=metric, ablation=ablation, edges=edges, steps=0)
    engine = make_engine(Setting(model.patched, TASK, metric, ablation, model.pahq_config), EngineConfig())
    full, empty = engine.metric_of(circuit.graph.all_edges), engine.metric_of(circuit.graph.no_edges())
    gap = abs(engine.metric_of(circuit.kept) - full)
    assert gap <= abs(empty - full) + 1e-6
    for edge in edge_list(circuit.kept):
        without = changed(circuit.kept, [edge], ())
        assert abs(engine.metric_of(without) - full) > gap - 3 * GAIN * abs(empty - full)


def notes_changed(path: Path, **notes: Any) -> None:
    """Say other things in the head of what was learned."""
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["run"]) | notes
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(arrays, path, metadata={"run": json.dumps(facts)})


@pytest.mark.exhaustive
def test_a_level_ahead_of_the_journal_is_believed_by_its_checksum_alone(tmp_path: Path) -> None:
    """Between the two a run may have been killed."""
    model = PAHQModel.from_pretrained("demo", precision="fp32")
    task = load_task("ioi", model.tokenizer, n=2, metric="kl")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    options: dict[str, Any] = {"search": "refine", "edges": 8, "steps": 0, "progress": False}
    model.discover(task, out=whole, **options)
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert [b'"level"' in line for line in lines[2:5]] == [True, True, False]
    wrong: list[dict[str, Any]] = [
        {"header": "x"}, {"header": None}, {"header": {}}, {"learned": "0" * 16},
        {"level": "1"}, {"level": True}, {"level": float("inf")}, {"level": 9},
    ]  # fmt: skip
    folder.mkdir()
    learned = folder / "learned.safetensors"
    for notes in [*wrong, {}]:
        (folder / "journal.jsonl").write_bytes(b"".join(lines[:3]))
        learned.write_bytes((whole / "learned.safetensors").read_bytes())
        notes_changed(learned, **notes)
        if notes:
            with pytest.raises(RunError, match="missing or damaged") as caught:
                model.discover(task, out=folder, resume=True, **options)
            assert "\n" not in str(caught.value)
    again = model.discover(task, out=folder, resume=True, **options)
    assert_same_circuit(again, Circuit.from_pretrained(whole))


@pytest.mark.parametrize("name", ["journal.jsonl", "learned.safetensors"])
def test_a_finished_run_is_what_its_journal_tells_of(finished: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) * 3 // 4] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(RunError):
        refined(small(), folder, resume=True)


@pytest.mark.parametrize("damage", ["lost", "cut", "changed", "another step"])
def test_what_was_kept_and_is_damaged_is_said_in_one_line(
    finished: Path, tmp_path: Path, damage: str
) -> None:
    for name in ("journal.jsonl", "learned.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    learned, journal = tmp_path / "learned.safetensors", tmp_path / "journal.jsonl"
    if damage == "lost":
        learned.unlink()
    elif damage == "cut":
        learned.write_bytes(learned.read_bytes()[:-100])
    elif damage == "changed":
        data = bytearray(learned.read_bytes())
        data[-1] ^= 1
        learned.write_bytes(bytes(data))
    else:
        lines = journal.read_bytes().splitlines(keepends=True)
        del lines[-2]  # a round is missing
        journal.write_bytes(b"".join(lines))
    with pytest.raises(RunError) as caught:
        refined(small(), tmp_path, resume=True)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"edges": 0}, ConfigError, "edges must be a whole number from 1 on; got 0"),
        ({"edges": 10_000}, ConfigError, "cannot keep 10,000 of them"),
        ({"edges": True}, ConfigError, "edges must be a whole number"),
        ({"steps": -1}, ConfigError, "steps"),
        ({"rate": float("nan")}, ConfigError, "rate"),
        ({"noise": float("inf")}, ConfigError, "noise"),
        ({"rate": 1e308}, ConfigError, "rate must be a number from 0 to 100"),
        ({"minibatch": 2.5}, ConfigError, "minibatch"),
        ({"seed": "x"}, ConfigError, "seed"),
        ({"threshold": 0.1}, ConfigError, "threshold"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        refined(small(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_metric_without_a_gradient_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name: find_metric(name) for name in known_metrics()}
    monkeypatch.setattr("pahq_hf.tasks.metrics._METRICS", names)  # what is registered ends with the test
    register_metric(MetricSpec("argmax", lambda logits, _: logits.argmax(-1).double(), differentiable=False))
    with pytest.raises(MetricError, match="no gradient, by which refine ranks"):
        refined(small(), tmp_path / "run", metric="argmax")
    assert not (tmp_path / "run").exists()


def test_learning_nothing_refines_the_ranking() -> None:
    found = refined(small(), steps=0)
    assert found.verified and found.edge_count <= 6


def test_all_edges_can_be_asked_for() -> None:
    model = small()
    graph = model.patched.graph
    found = refined(model, edges=graph.edge_count, steps=1)
    assert (found.kept == graph.live_edges(graph.all_edges)).all()


@examples(100)
@given(
    layers=st.integers(1, 30), heads=st.integers(1, 12), edges=st.integers(1, 3000), steps=st.integers(0, 50)
)
def test_a_schedule_falls_to_the_size(layers: int, heads: int, edges: int, steps: int) -> None:
    graph = Graph(GraphSpec(layers=layers, heads=heads, kv_groups=heads))
    edges = min(edges, graph.edge_count)
    schedule = Schedule.towards(edges, graph, steps, 0.05, 0.3, 0)
    assert schedule.levels[-1] == edges and list(schedule.levels) == sorted(schedule.levels, reverse=True)
    assert schedule.total == sum(schedule.steps_of(level) for level in range(len(schedule.levels)))
    sizes = [schedule.size(k, share) for k in range(len(schedule.levels)) for share in (0.1, 0.5, 1.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == edges
    assert all(1 <= size <= graph.edge_count for size in sizes)


def test_the_command_line_finds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["discover", "demo", "--task", "ioi", "--n", "2", "--metric", "kl", "--search", "refine"]
    assert run_main(*arguments, "--edges", "12", "--steps", "0", "--out", str(tmp_path / "run")) == 0
    facts = json.loads((tmp_path / "run" / "discovery.json").read_text())
    assert facts["refine"]["rounds"] > 0 and facts["edges"]["kept"] <= 12
    assert "learned.safetensors" in files_of(tmp_path / "run")
    said = re.search(r"refining: (\d+) removed edges in .*, left (\d+), gap ", capsys.readouterr().err)
    assert said is not None and int(said[1]) + int(said[2]) == facts["refine"]["start"]
    assert run_main(*arguments, "--edges", "0", "--out", str(tmp_path / "other")) == 2
    assert "edges" in capsys.readouterr().err
