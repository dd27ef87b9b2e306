"""Memory of a GPU: what counts as free, what says that it ran out, and going on with less at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pahq_hf.engine.hooks.passes import BUFFER_BYTES, buffer_bytes
from pahq_hf.precision.device_memory import free_memory, out_of_memory
from tests.pretend.process import BEST, rehearsed
from tests.tiers import quick

WORK = ("recording", "capture", "begin", "focus", "batch", "slopes", "look", "decision", "next focus")

LOW = {"regime": "pahq", "compute": "bf16"}
FULL = {"regime": "fp32"}
LITERAL = {"regime": "pahq-literal"}
TABLES = LOW | {"quantize_embeddings": True}
HOOKS = {"engine": "hooks"}
ENGINES: dict[str, dict[str, Any]] = {
    "sparse": {"config": FULL},
    "sparse, anchored": {"config": LOW},
    "sparse, raised": {"config": LITERAL},
    "hooks": {"config": FULL, "engine": HOOKS},
    "hooks, anchored": {"config": LOW, "engine": HOOKS},
    "hooks, raised": {"config": LITERAL, "engine": HOOKS},
    "tables": {"config": TABLES},
    "tables, nll": {"config": TABLES, "search": {"metric": "nll"}},
}
# Of what a step takes; others get two thirds.
SHARES = {"batch": 0.3, "begin": 0.3, "slopes": 0.3, "recording": 0.5}
# Of a model of two layers there is next to nothing that a circuit's state could do without.
_LARGE = ("capture", "begin", "focus")


def _short(engine: str, step: str, share: float) -> dict[str, Any]:
    return {
        "command": "shortage",
        "model": "demo" if step in _LARGE or "tables" in engine else "llama",
        "n": 24 if step == "recording" else 8,
        "during": step,
        "capacity": share,
        **ENGINES[engine],
    }


# The hooks engine takes nothing to focus without anchors, and has let go of as much before with them; in FP32
# the sparse engine's captured runs, and its state, are all there is.
_STEPS = ("focus", "next focus")
_TAKES_NOTHING = [f"{name}: {step}" for name in ENGINES if "hooks" in name for step in _STEPS]
_NOTHING_TO_FREE = ["sparse: capture", "sparse: focus", "sparse, anchored: capture"]
SHORT: dict[str, dict[str, Any]] = {
    f"{engine}: {step}": _short(engine, step, SHARES.get(step, 0.66))
    for engine in ENGINES
    if not engine.startswith("tables")
    for step in WORK
    if f"{engine}: {step}" not in (*_TAKES_NOTHING, *_NOTHING_TO_FREE)
}
# The vocabulary's table, in low precision on the device, is kept decoded for metrics.
SHORT |= {f"{engine}: begin": _short(engine, "begin", 0.4) for engine in ("tables", "tables, nll")}
HOPELESS = {
    f"{engine}: {step}": _short(engine, step, share)
    for engine, step, share in (
        ("sparse", "recording", 0.01),
        ("sparse", "capture", 0.3),
        ("sparse", "begin", 0.1),
        ("sparse", "focus", 0.1),
    )
}


@pytest.mark.parametrize("name", quick(HOPELESS, "sparse: recording", "sparse: focus"))
def test_what_does_not_fit_at_all_is_said_in_one_line(name: str) -> None:
    failed = rehearsed(BEST, HOPELESS[name])["failed"].strip().splitlines()
    assert failed[-1].startswith("pahq_hf.errors.OutOfMemoryError: "), failed[-1]
    assert "has no room for" in failed[-1] and "take fewer or shorter prompts" in failed[-1]
    assert not failed[-2].startswith("torch")


_QUICK = (
    *("sparse: batch", "sparse, raised: focus", "sparse, anchored: slopes", "sparse, anchored: decision"),
    "hooks: batch",
)


@pytest.mark.parametrize("name", quick(SHORT, *_QUICK))
def test_what_does_not_fit_is_computed_in_parts(name: str) -> None:
    """The values are the CPU's, with a share of the memory that a step takes where it has all it wants."""
    outcome = rehearsed(BEST, SHORT[name])
    assert not outcome["failed"], outcome["failed"]
    assert outcome["error"] < 1e-6 * max(1.0, outcome["scale"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
    ],
    ids=lambda error: str(error)[:40],
)
def test_memory_that_ran_out_is_recognised(error: RuntimeError) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "text", ["CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", "mat1 and mat2 shapes cannot be"]
)
def test_other_errors_are_not(text: str) -> None:
    assert not out_of_memory(RuntimeError(text))


def test_what_pytorch_keeps_in_its_cache_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (10 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 50 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 20 << 30)
    device = torch.device("cuda", 0)
    assert free_memory(device) == 40 << 30
    assert buffer_bytes(device) == 5 << 30  # of the hooks engine: many examples in one pass


def test_the_hooks_engine_takes_as_many_examples_at_once_on_a_cpu_as_ever() -> None:
    assert buffer_bytes(torch.device("cpu")) == BUFFER_BYTES
