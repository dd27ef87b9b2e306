"""Run the product on the pretended device or a real card, and on the CPU to compare. A process of its own:

    python -m tests.pretend.rehearse FORM

Scenarios come from stdin, each a JSON line with fields of `Scenario`; an `Outcome` for each goes to stdout.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc
import os
import sys
from typing import Any, get_args

gc.disable()  # until all is imported, which takes a third longer with it
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.pretend.form import Form, prepare

FORM: Form = next((form for form in get_args(Form) if form in sys.argv[1:2]), "pure")
KIND = prepare(FORM)

import contextlib
import json
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pahq_hf import ACDCConfig, Circuit, EngineConfig, PAHQConfig, PAHQModel, Task, load_task
from pahq_hf.precision import products
from tests.pretend import shortage
from tests.pretend.cuda import count, install
from tests.pretend.scenario import Answer, Outcome, Scenario
from tests.pretend.tensor import MACHINE

torch.set_num_threads(1)
MODE: TorchDispatchMode = count() if FORM == "card" else install(KIND)
DEVICE = MACHINE.device
CHECKPOINTS = tempfile.TemporaryDirectory(prefix="pahq-pretend-")  # gone when the process ends


@cache
def folder(model: str, dtype: str) -> str:
    """A checkpoint of a family, saved once in this process."""
    if model == "demo":
        return model
    from tests.families import ALL_FAMILIES

    path = Path(CHECKPOINTS.name) / dtype / model
    ALL_FAMILIES[model](dtype=torch.float32).to(getattr(torch, dtype)).save_pretrained(path)
    return str(path)


def load(scenario: Scenario, *, on_device: bool) -> PAHQModel:
    config = dict(scenario.config)
    if not on_device and config.get("compute") == "fp8":
        config["compute"] = "bf16"  # the CPU has none
    name, pahq = folder(scenario.model, scenario.dtype), PAHQConfig(**config)
    if not on_device:
        return PAHQModel.from_pretrained(name, pahq)
    if scenario.load == "to":
        return PAHQModel.from_pretrained(name, pahq).to(DEVICE)
    if scenario.load == "wrap":
        from pahq_hf.checkpoint.load import load, load_tokenizer

        hf, source = load(name, streamed=False)
        return PAHQModel(hf.to(DEVICE), pahq, tokenizer=load_tokenizer(name), source=source)
    places: dict[str, Any] = {"direct": {"": DEVICE}, "zero": {"": 0}, "auto": "auto"}
    return PAHQModel.from_pretrained(name, pahq, device_map=places[scenario.load])


def prompts(scenario: Scenario, model: PAHQModel) -> Task:
    if scenario.model == "demo":
        return load_task("ioi", model.tokenizer, n=scenario.n, seed=0)
    from tests.models import random_task

    return random_task(padding="left", batch=scenario.n)


def of_circuit(circuit: Circuit) -> Answer:
    facts: dict[str, Any] = {
        name: circuit.discovery.get(name) for name in ("hardware", "peak_memory", "versions")
    }
    if circuit.estimated is not None:
        facts["estimated"] = int(circuit.estimated.sum())
    return Answer(circuit.kept, circuit.scores, facts)


def discovered(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    """A circuit, and which readers asked for had no edge decided by a score: what is dead is not computed."""
    circuit = discover(scenario, model, task)
    found = of_circuit(circuit)
    graph, asked = circuit.graph, scenario.search.get("readers")
    named = np.flatnonzero(graph.match_readers(asked)) if asked else ()
    found.facts["untested"] = [graph.readers[row].name for row in named if not circuit.tested[row].any()]
    return found


def discover(scenario: Scenario, model: PAHQModel, task: Task) -> Circuit:
    search = ACDCConfig.from_dict({"threshold": 0.05, **scenario.search})
    return model.discover(task, config=search, engine=EngineConfig(**scenario.engine), progress=False)


def some_circuit(model: PAHQModel) -> Circuit:
    """Edges chosen by chance, the same on any device."""
    graph = model.graph
    kept = graph.all_edges & (np.random.default_rng(0).random(graph.all_edges.shape) < 0.7)
    facts = {"arguments": {"metric": "kl", "ablation": "corrupted"}}
    return Circuit(graph, kept, np.zeros(kept.shape), kept, model.identity.to_json(), facts)


def sweep(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    found = model.sweep(task, thresholds=[0.05, 0.5], progress=False, **scenario.search)
    circuits = list(found.values())
    return Answer(np.stack([c.kept for c in circuits]), np.stack([c.scores for c in circuits]))


def attribute(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    metric = "kl" if scenario.method == "eap-ig" else "logit_diff"
    circuit = model.attribute(
        task, method=scenario.method, metric=metric, topn=20, engine=EngineConfig(**scenario.engine)
    )
    return of_circuit(circuit)


def refined(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    """The best quarter of all edges, by gradients at circuits and exact tests."""
    circuit = model.discover(
        task,
        search="refine",
        edges=model.graph.edge_count // 4,
        steps=0,
        engine=EngineConfig(**scenario.engine),
        progress=False,
    )
    # Its scores are ranks, which edges that are alike may change.
    return Answer(circuit.kept, np.array([circuit.record.metric.fp32]))


def masked(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    """A quarter of all edges, by masks that are learned for a few steps."""
    circuit = model.discover(
        task,
        search=scenario.method,
        edges=model.graph.edge_count // 4,
        steps=20,
        engine=EngineConfig(**scenario.engine),
        progress=False,
    )
    # Steps are as long for gradients that are next to nothing, so the edges need not be the CPU's.
    return Answer(np.array([circuit.edge_count]), np.array([circuit.record.metric.fp32]))


def budget(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    """The gap of a circuit stays within a bound."""
    engine = EngineConfig(**scenario.engine)
    return of_circuit(
        model.discover(task, search="budget", max_gap=0.2, engine=engine, progress=False, **scenario.search)
    )


def both(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    """A search by noising and one by denoising."""
    engine = EngineConfig(**scenario.engine)
    return of_circuit(
        model.discover(
            task, threshold=0.05, direction="both", engine=engine, progress=False, **scenario.search
        )
    )


def audit(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    """A search, and a second opinion on what it removed: tests in FP32 where it decided."""
    circuit = discover(scenario, model, task)
    found = model.evaluate(circuit, task, audit=4)
    said = found["audit"]
    numbers = [found["kl"], said["removed"], said["audited"], said["estimated"], said["wrong"]]
    return Answer(circuit.kept, np.array(numbers))


def evaluate(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    found = model.evaluate(
        some_circuit(model), task, minimality=True, completeness=True, samples=2, curve=True
    )
    numbers = [found["kl"], found["metric"]["full"], found["metric"]["empty"]]
    return Answer(found["edges_live"], np.array(numbers))


def apply(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    device, logits = model.patched.device, []
    mask = task.attention_mask.to(device)
    for exact in (True, False):
        with model.apply(
            some_circuit(model), corrupted=task.corrupted_ids.to(device), corrupted_mask=mask, exact=exact
        ):
            found = model(
                input_ids=task.clean_ids.to(device),
                attention_mask=mask,
                position_ids=task.position_ids.to(device),
            )
        logits.append(found.logits.cpu().numpy())
    return Answer(logits[0].argmax(-1), np.stack(logits))


def generate(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    device = model.patched.device
    mask = task.attention_mask[:1].to(device)
    with model.apply(some_circuit(model), corrupted=task.corrupted_ids[:1].to(device), corrupted_mask=mask):
        made = model.generate(
            task.clean_ids[:1].to(device), attention_mask=mask, max_new_tokens=2, do_sample=False
        )
    return Answer(made.cpu().numpy(), np.zeros(1))


def moved(scenario: Scenario, model: PAHQModel, task: Task) -> Answer:
    """A search on the CPU, and, where the device is wanted, one after a move to it."""
    config = PAHQConfig(**scenario.config)
    ours = model.patched.device == DEVICE
    native = products.native_bf16
    products.native_bf16 = lambda device: device == DEVICE
    try:
        model = PAHQModel.from_pretrained("demo", config)
        facts = {"before": model.pahq_config.compute}
        circuit = discover(scenario, model, task)
        if ours:
            facts["moved"] = model.to(DEVICE).pahq_config.compute
            circuit = discover(scenario, model, task)
            facts["found"] = circuit.discovery["precision"]["compute"]
    finally:
        products.native_bf16 = native
    return Answer(circuit.kept, circuit.scores, facts)


COMMANDS: dict[str, Callable[[Scenario, PAHQModel, Task], Answer]] = {
    "discover": discovered,
    "refine": refined,
    "masks": masked,
    "budget": budget,
    "both": both,
    "sweep": sweep,
    "attribute": attribute,
    "evaluate": evaluate,
    "audit": audit,
    "apply": apply,
    "shortage": shortage.run,
    "generate": generate,
    "moved": moved,
}


def command_line(scenario: Scenario, *, on_device: bool) -> tuple[Answer, str]:
    """`pahq discover --device`."""
    from typer.testing import CliRunner

    from pahq_hf.cli.app import app

    with tempfile.TemporaryDirectory() as out:
        path = str(Path(out) / "run")
        words = ["discover", scenario.model, "--task", "ioi", "--n", str(scenario.n), "--threshold", "0.05"]
        words += ["--precision", scenario.config.get("regime", "pahq"), "--out", path]
        words += ["--readers", scenario.search["readers"], "--tests", scenario.search.get("tests", "all")]
        words += ["--device", KIND] if on_device else []
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        if result.exit_code:
            raise RuntimeError(result.output)
        circuit = Circuit.from_pretrained(path)
    return of_circuit(circuit), circuit.discovery["versions"]["device"]


def answer(scenario: Scenario, *, on_device: bool) -> tuple[Answer, str]:
    if scenario.command == "cli":
        return command_line(scenario, on_device=on_device)
    model = load(scenario, on_device=on_device)
    return COMMANDS[scenario.command](scenario, model, prompts(scenario, model)), str(model.patched.device)


@cache
def _known(text: str) -> Answer:
    return answer(Scenario(**json.loads(text)), on_device=False)[0]


def reference(scenario: Scenario) -> Answer:
    """The CPU's answer."""
    plain = replace(scenario, load="direct", capacity=1.0, during="")  # memory is not short
    return _known(json.dumps(asdict(plain), sort_keys=True))


def on_device(scenario: Scenario) -> tuple[Answer, str]:
    """The device's answer."""
    try:
        return answer(scenario, on_device=True)
    finally:
        MACHINE.memory.capacity = None


def rehearse(scenario: Scenario) -> Outcome:
    outcome = Outcome(asdict(scenario))
    try:
        expected = reference(scenario)
        MACHINE.launches.clear()
        MACHINE.crossings.clear()
        MACHINE.sent.clear()
        with MODE:
            found, outcome.device = on_device(scenario)
    except Exception:
        outcome.failed = traceback.format_exc()
        return outcome
    outcome.same = bool(np.array_equal(expected.choice, found.choice))
    outcome.error = float(np.abs(np.asarray(expected.numbers) - np.asarray(found.numbers)).max())
    outcome.scale = float(np.abs(np.asarray(expected.numbers)).max())
    outcome.kept = int(np.asarray(found.choice).sum())
    outcome.facts = found.facts
    outcome.launches = sum(MACHINE.launches.values())
    outcome.products_in_fp8 = MACHINE.launches["_scaled_mm"]
    outcome.crossings = dict(MACHINE.crossings)
    outcome.sent = dict(MACHINE.sent)
    return outcome


def main() -> None:
    gc.freeze()  # what is imported stays: collections pass over it
    gc.enable()
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what runs say is not the answer
        for line in sys.stdin:
            print(json.dumps(asdict(rehearse(Scenario(**json.loads(line))))), file=answers, flush=True)


if __name__ == "__main__":
    main()
