"""Searches on a card against the same searches on the CPU: circuits, scores, and whether runs repeat."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_products import settle
from benchmarks.variants import Variant
from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.config import EngineConfig, EngineName


@dataclass(frozen=True)
class Suite:
    """Searches of one model.

    Attributes:
        variants: Precision regimes, as `Variant.parse` reads them, each with an engine.
        n: Prompt pairs.
        threshold: Tau.
        readers: Only these, by glob; all if None.
        repeat: Search twice, to see whether runs repeat to the bit.
    """

    variants: tuple[tuple[str, EngineName], ...]
    n: int
    threshold: float
    readers: str | None = None
    repeat: bool = True


_REGIMES = (
    "fp32", "pahq:compute=fp32", "pahq:compute=bf16", "pahq:compute=fp8", "pahq:int8", "pahq:fp8-e5m2",
    "pahq:bf16", "pahq:active=both", "rtn", "pahq-literal",
)  # fmt: skip
DEMO = Suite(
    (*((name, "sparse") for name in _REGIMES), ("fp32", "hooks"), ("pahq:compute=bf16", "hooks")), 20, 0.05
)
MODEL = Suite(
    (("fp32", "sparse"), ("pahq:compute=bf16", "sparse"), ("pahq:compute=fp8", "sparse"), ("rtn", "sparse")),
    8,
    0.05,
    repeat=False,
)


def agreement(model: str, device: torch.device, suite: Suite) -> dict[str, Any]:
    """Every search of a suite on the card, and FP32's and the regime's own on the CPU.

    Args:
        model: Checkpoint.
        device: The card.
        suite: What to search.

    Returns:
        A row for each search.
    """
    cpu = torch.device("cpu")
    reference, seconds = _search(model, cpu, "fp32", "sparse", suite)
    rows = []
    for name, engine in suite.variants:
        row: dict[str, Any] = {"regime": name, "engine": engine}
        try:
            row |= _compare(model, device, name, engine, suite, reference)
        except Exception as error:  # one regime that fails does not hide the others
            row |= {"failed": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
    tested = int(reference.tested.sum())
    return {"cpu_fp32_seconds": seconds, "tested": tested, "kept": reference.edge_count, "searches": rows}


def _compare(
    model: str, device: torch.device, name: str, engine: EngineName, suite: Suite, reference: Circuit
) -> dict[str, Any]:
    found, seconds = _search(model, device, name, engine, suite)
    regime = Variant.parse(name).pahq.regime
    alike = reference
    if regime in ("rtn", "pahq-literal"):  # these differ from FP32 on any device
        alike, _ = _search(model, torch.device("cpu"), name, engine, suite)
    both = reference.tested & found.tested
    ours, theirs = found.scores[both], reference.scores[both]
    large = np.abs(theirs) > suite.threshold / 10
    relative = np.abs(ours - theirs)[large] / np.abs(theirs)[large]
    row: dict[str, Any] = {
        "seconds": seconds,
        "kept": found.edge_count,
        "same_circuit": bool(np.array_equal(found.kept, alike.kept)),
        "fp32_circuit": bool(np.array_equal(found.kept, reference.kept)),
        "score_error": float(np.abs(ours - theirs).max(initial=0)),
        "relative_median": float(np.median(relative)) if len(relative) else None,
        "relative_99": float(np.quantile(relative, 0.99)) if len(relative) else None,
        "looks": found.discovery["second_looks"]["tests"],
    }
    if suite.repeat:
        again, _ = _search(model, device, name, engine, suite)
        row["repeats"] = bool(
            np.array_equal(found.scores, again.scores) and np.array_equal(found.kept, again.kept)
        )
    return row


def _search(
    model: str, device: torch.device, name: str, engine: EngineName, suite: Suite
) -> tuple[Circuit, float]:
    loaded = _load(model, device, name)
    task = load_task("ioi", loaded.tokenizer, n=suite.n)
    started = time.perf_counter()
    circuit = loaded.discover(
        task,
        threshold=suite.threshold,
        readers=suite.readers,
        engine=EngineConfig(engine),
        progress=False,
    )
    settle(device)
    return circuit, time.perf_counter() - started


def _load(model: str, device: torch.device, name: str, place: Any = None) -> PAHQModel:
    if place is None and device.type != "cpu":
        place = {"": device}
    return PAHQModel.from_pretrained(
        model, Variant.parse(name).pahq, **({} if place is None else {"device_map": place})
    )


def loads(device: torch.device) -> dict[str, Any]:
    """The ways onto a card, each with a search: one circuit."""
    suite = Suite((), 8, 0.05)
    reference, _ = _search("demo", torch.device("cpu"), "pahq", "sparse", suite)
    rows = []
    for way in ("device_map", "auto", "to", "index"):
        row: dict[str, Any] = {"load": way}
        try:
            row |= _loaded(way, device, suite, reference)
        except Exception as error:
            row |= {"failed": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
    return {"loads": rows}


def _loaded(way: str, device: torch.device, suite: Suite, reference: Circuit) -> dict[str, Any]:
    if way == "to":
        model = PAHQModel.from_pretrained("demo").to(device)
    else:
        place = {"device_map": {"": device}, "auto": "auto", "index": device.index or 0}[way]
        model = _load("demo", device, "pahq", place if device.type == "cuda" else None)
    task = load_task("ioi", model.tokenizer, n=suite.n)
    circuit = model.discover(task, threshold=suite.threshold, progress=False)
    return {
        "on": str(model.patched.device),
        "kept": circuit.edge_count,
        "same_circuit": bool(np.array_equal(circuit.kept, reference.kept)),
    }


def commands(device: torch.device) -> dict[str, Any]:
    """Everything else a model can be asked, on the card: evaluate, apply, generate, attribute, sweep."""
    model = _load("demo", device, "pahq")
    task = load_task("ioi", model.tokenizer, n=8)
    circuit = model.discover(task, threshold=0.05, progress=False)
    rows = [_timed("evaluate", lambda: model.evaluate(circuit, task, curve=True, minimality=True))]
    ids, mask = task.clean_ids[:2].to(device), task.attention_mask[:2].to(device)
    corrupted = task.corrupted_ids[:2].to(device)

    def speak() -> object:
        with model.apply(circuit, corrupted=corrupted, corrupted_mask=mask):
            return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)

    rows.append(_timed("apply, generate", speak))
    for method in ("eap", "eap-ig", "hisp", "exact"):
        rows.append(_timed(method, lambda method=method: _attribute(model, task, method)))
    rows.append(_timed("sweep", lambda: model.sweep(task, thresholds=[0.05, 0.1], progress=False)))
    rows.append(
        _timed(
            "screen", lambda: model.discover(task, threshold=0.05, screen="eap-ig:0.5", metric="logit_diff")
        )
    )
    for ablation in ("zero", "mean", "mean-corrupted"):
        rows.append(
            _timed(
                f"ablation {ablation}",
                lambda ablation=ablation: model.discover(
                    task, threshold=0.05, ablation=ablation, progress=False
                ),
            )
        )
    return {"commands": rows}


def _attribute(model: PAHQModel, task: Any, method: str) -> object:
    return model.attribute(task, method=method, metric="logit_diff", topn=20)


def _timed(name: str, function: Any) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        function()
    except Exception as error:
        return {"command": name, "failed": f"{type(error).__name__}: {error}"[:300]}
    return {"command": name, "seconds": time.perf_counter() - started}
