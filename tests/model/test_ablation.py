"""A circuit keeps the ablation it was found under, and says how well it answers under each."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from pahq_hf import Circuit, PAHQModel, Task, load_task
from pahq_hf.circuit.card import render_card
from pahq_hf.circuit.render.facts import run_facts
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.errors import AblationWarning
from tests.helpers import FP32, wrapped
from tests.models import random_task, relative_error
from tests.plain import answers
from tests.tiers import quick

FEW = 3  # tokens that circuits say here


@cache
def demo() -> PAHQModel:
    return PAHQModel.from_pretrained("demo", FP32)


@cache
def demo_task(name: str, *, seed: int = 0, n: int = 12) -> Task:
    return load_task(name, demo().tokenizer, n=n, seed=seed)


@cache
def demo_circuit(name: str, ablation: Any, threshold: float) -> Circuit:
    return demo().discover(demo_task(name), threshold=threshold, ablation=ablation, progress=False)


@cache
def pooled_circuit(name: str, threshold: float) -> Circuit:
    """A circuit of the default ablation with means over all tokens only, as earlier versions kept them."""
    circuit = demo_circuit(name, "corrupted", threshold)
    assert circuit.means is not None
    circuit = replace(circuit, means={key: circuit.means[key] for key in ("embedding", "z", "mlp")})
    measured = demo().evaluate(circuit, demo_task(name))["apply"]
    return replace(circuit, discovery=circuit.discovery | {"apply": measured})


def said(model: PAHQModel, task: Task, count: int = FEW) -> Tensor:
    """What the model says after the prompts. [batch, count]"""
    ids = model.generate(
        task.clean_ids, attention_mask=task.attention_mask, max_new_tokens=count, do_sample=False
    )
    return ids[:, task.length :]


def right(tokens: Tensor, task: Task) -> float:
    """Share of first tokens that are right answers."""
    hits = [token in answer for token, answer in zip(tokens[:, 0].tolist(), task.answers, strict=True)]
    return sum(hits) / len(hits)


@contextmanager
def silence() -> Iterator[None]:
    """Inside, a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- the ablation it was found under -----------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["mean", "mean-corrupted", "zero"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_plain_apply_is_the_ablation_it_was_found_under(ablation: Any, padding: str, tmp_path: Path) -> None:
    model, task = wrapped("llama"), random_task(padding=padding, rows=2)
    model.discover(task, threshold=0.05, ablation=ablation, out=tmp_path / "run", progress=False)
    circuit = Circuit.from_pretrained(tmp_path / "run")
    assert 0 < circuit.edge_count < model.graph.edge_count
    expected = HooksEngine(model.patched, task, "kl", ablation=ablation).logits(circuit.kept)
    with silence(), model.apply(circuit):
        assert relative_error(answers(model, task), expected) < 1e-5


@pytest.mark.parametrize("name", quick(["ioi", "sva", "gendered_pronoun", "greater_than"], "ioi", "sva"))
def test_a_circuit_found_under_means_speaks_as_the_model_on_unseen_prompts(name: str) -> None:
    circuit = demo().discover(demo_task(name, n=24), threshold=0.01, ablation="mean", progress=False)
    unseen = demo_task(name, seed=5, n=20)
    assert circuit.edge_count < 60
    full = said(demo(), unseen)
    with silence(), demo().apply(circuit):
        found = said(demo(), unseen)
    assert right(found, unseen) >= 0.9 * right(full, unseen) > 0.8
    # What follows the answer is no part of the task: means carry it.
    assert (found[:, 1:] == full[:, 1:]).float().mean() >= 0.9
    assert len({tuple(row) for row in found.tolist()}) > 1, "it should not say one thing to all prompts"


def test_generation_with_means_is_the_same_with_and_without_a_cache() -> None:
    circuit, task = demo_circuit("ioi", "mean", 0.01), demo_task("ioi")
    with demo().apply(circuit):
        some, others = (
            demo().generate(task.clean_ids, max_new_tokens=8, do_sample=False, use_cache=use, eos_token_id=-1)
            for use in (True, False)
        )
    assert torch.equal(some, others)


def test_means_by_position_are_those_of_the_prompts_and_go_on_behind_them() -> None:
    model, task = wrapped("llama"), random_task()
    circuit = model.discover(task, threshold=1e9, progress=False)
    assert circuit.means is not None
    run = HooksEngine(model.patched, task, "kl").corrupted
    by_position = circuit.means["position.z"]
    np.testing.assert_allclose(by_position[1, : task.length], run.z[1].mean(0), rtol=1e-4, atol=1e-6)
    text = task.corrupted_ids
    for _ in range(by_position.shape[1] - task.length):
        with torch.no_grad():
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    longer = Task(**{**vars(task), "clean_ids": text, "corrupted_ids": text, "attention_mask": text**0})
    z = HooksEngine(model.patched, longer, "kl").corrupted.z[1]
    np.testing.assert_allclose(by_position[1], z.mean(0), rtol=1e-4, atol=1e-6)
    ragged = model.discover(random_task(padding="left"), threshold=1e9, progress=False)
    assert ragged.means is not None and set(ragged.means) == {"embedding", "z", "mlp"}


@pytest.mark.parametrize("name", quick(["ioi", "sva", "gendered_pronoun", "greater_than"], "ioi", "sva"))
def test_a_circuit_of_the_default_ablation_speaks_sensibly_too(name: str) -> None:
    """Means over all tokens made these say "Nick Nick Nick"; means by position leave the task its answers."""
    circuit = demo().discover(demo_task(name, n=24), threshold=0.01, progress=False)
    unseen = demo_task(name, seed=5, n=20)
    full = said(demo(), unseen)
    with (
        pytest.warns(AblationWarning, match=r"found under corrupted ablation.*by position"),
        demo().apply(circuit),
    ):
        found = said(demo(), unseen)
    with silence(), demo().apply(circuit, corrupted=unseen.corrupted_ids):
        beside = said(demo(), unseen)
    assert right(found, unseen) >= 0.8 * right(full, unseen)
    assert right(beside, unseen) >= 0.8 * right(full, unseen)
    for spoken in (found, beside):
        assert (spoken[:, 1:] == full[:, 1:]).float().mean() >= 0.9


# -- what it says of itself --------------------------------------------------------------------------


def test_the_accuracies_it_carries_are_what_a_user_gets(tmp_path: Path) -> None:
    model, task = demo(), demo_task("ioi")
    runs = {
        "discover": lambda out: model.discover(task, threshold=0.05, out=out, progress=False),
        "attribute": lambda out: model.attribute(task, method="eap-ig", topn=40, out=out),
        "mean": lambda out: model.discover(task, threshold=0.1, ablation="mean", out=out, progress=False),
        "sweep": lambda out: model.sweep(task, thresholds=[0.05], out=out, progress=False),
    }
    for name, run in runs.items():
        run(tmp_path / name)
        folder = tmp_path / name / ("tau-0.05" if name == "sweep" else "")
        circuit = Circuit.from_pretrained(folder)
        section = json.loads((folder / "discovery.json").read_text())["apply"]
        own = "mean" if name == "mean" else "corrupted"
        plain = "mean" if name == "mean" else "mean-corrupted"
        assert section["ablation"] == plain and set(section["accuracy"]) == {own, plain, "corrupted", "full"}
        assert section["accuracy"]["full"] == right(said(model, task, 1), task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AblationWarning)
            with model.apply(circuit):
                assert section["accuracy"][plain] == right(said(model, task, 1), task), name
            with model.apply(circuit, corrupted=task.corrupted_ids):
                assert section["accuracy"]["corrupted"] == right(said(model, task, 1), task), name


def test_poor_answers_under_another_ablation_are_told_with_their_figure() -> None:
    model, circuit, task = demo(), pooled_circuit("sva", 0.05), demo_task("sva")
    with pytest.warns(AblationWarning) as caught, model.apply(circuit):
        found = right(said(model, task, 1), task)
    (warning,) = caught
    assert found < 0.5 and warning.filename == __file__
    assert re.search(
        rf"found under corrupted ablation.*stored means.* is {found:.3g}, the full model's 1; give corrupted "
        r"prompts \(corrupted=ids\), or search with ablation='mean'",
        str(warning.message),
    )
    with silence(), model.apply(circuit, corrupted=task.corrupted_ids):
        assert right(said(model, task, 1), task) == 1
    told = "found under mean ablation.*what the corrupted prompts write"
    means = demo_circuit("sva", "mean", 0.01)
    with pytest.warns(AblationWarning, match=told), model.apply(means, corrupted=task.corrupted_ids):
        pass
    told = "the means you gave.*is not known"
    with pytest.warns(AblationWarning, match=told), model.apply(means, means=means.means):
        pass


def test_corrupted_prompts_are_advised_only_where_they_help() -> None:
    nothing = demo().graph.no_edges()
    empty = replace(pooled_circuit("sva", 0.05), kept=nothing)
    measured = demo().evaluate(empty, demo_task("sva"))["apply"]
    assert measured["accuracy"]["corrupted"] < 0.8
    empty = replace(empty, discovery=empty.discovery | {"apply": measured})
    with pytest.warns(AblationWarning) as caught, demo().apply(empty):
        pass
    assert "the full model's 1" in str(caught[0].message) and "give corrupted" not in str(caught[0].message)


def test_what_earlier_versions_saved_runs_and_says_that_it_was_not_measured(tmp_path: Path) -> None:
    model, task = demo(), demo_task("ioi")
    demo_circuit("ioi", "mean", 0.01).save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "discovery.json").read_text())
    del facts["apply"], facts["checksums"]
    (tmp_path / "discovery.json").write_text(json.dumps(facts))
    scores = tmp_path / "scores.safetensors"
    save_file(load_file(scores), scores)  # without the note that there are checksums
    means = load_file(tmp_path / "means.safetensors")
    save_file({name: means[name] for name in ("embedding", "z", "mlp")}, tmp_path / "means.safetensors")
    circuit = Circuit.from_pretrained(tmp_path)
    with pytest.warns(AblationWarning, match="means over all tokens.*is not known"), model.apply(circuit):
        assert answers(model, task).isfinite().all()


def test_a_damaged_section_of_accuracies_is_no_figure(tmp_path: Path) -> None:
    demo_circuit("ioi", "mean", 0.01).save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "discovery.json").read_text())
    for broken in (3, {"accuracy": 3}, {"accuracy": {"full": "1", "mean": None, "corrupted": True}}):
        facts["apply"] = broken
        (tmp_path / "discovery.json").write_text(json.dumps(facts))
        circuit = Circuit.from_pretrained(tmp_path)
        with silence(), demo().apply(circuit):
            pass
        assert "accuracy when" not in render_card(circuit)


def test_the_card_shows_the_way_that_works() -> None:
    poor, good = pooled_circuit("sva", 0.05), demo_circuit("sva", "mean", 0.01)
    card = render_card(poor)
    assert "with model.apply(circuit, corrupted=task.corrupted_ids):" in card
    share = poor.discovery["apply"]["accuracy"]["mean over tokens"]
    assert f"| accuracy when removed edges carry stored means over all tokens | {share:.6g} |" in card
    other = render_card(good)
    assert "with model.apply(circuit):" in other
    for circuit, text in ((poor, card), (good, other)):
        (loading, running) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        program = loading.replace("'path/to/this/folder'", "FOLDER") + running.replace(
            "    model.generate", "    said = model.generate"
        )
        names: dict[str, Any] = {"FOLDER": circuit}
        program = program.replace("Circuit.from_pretrained(FOLDER)", "FOLDER")
        exec(program, names)
        spoken = names["said"][:, names["task"].length :]
        assert right(spoken, names["task"]) >= 0.75, text


def test_tables_and_pages_name_the_ablation_and_the_accuracy() -> None:
    facts = run_facts(pooled_circuit("sva", 0.05))
    share = pooled_circuit("sva", 0.05).discovery["apply"]["accuracy"]["mean over tokens"]
    assert facts["ablation"] == "corrupted"
    assert facts["in apply()"] == f"accuracy {share:.4g} (mean over tokens)"


def test_evaluate_measures_the_same_on_other_prompts() -> None:
    model, circuit = demo(), demo_circuit("ioi", "mean", 0.01)
    unseen = demo_task("ioi", seed=9, n=10)
    found = model.evaluate(circuit, unseen)["apply"]
    with model.apply(circuit):
        assert found["accuracy"]["mean"] == right(said(model, unseen, 1), unseen)
    assert found["ablation"] == "mean" and found["accuracy"]["full"] == 1
