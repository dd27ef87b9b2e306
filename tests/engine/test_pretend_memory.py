"""Memory of a GPU: what counts as free, what says that it ran out, and going on with less at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pahq_hf.engine.hooks.engine import BUFFER_BYTES, buffer_bytes
from pahq_hf.engine.sparse.budget import free_memory, out_of_memory
from tests.pretend.process import BEST, rehearsed

LOW = {"regime": "pahq", "compute": "bf16"}
FULL = {"regime": "fp32"}
HOOKS = {"engine": "hooks"}
BATCHES: dict[str, dict[str, Any]] = {
    "sparse, a third": {"config": FULL, "capacity": 0.3},
    "sparse, nine tenths": {"config": FULL, "capacity": 0.9},
    "sparse, anchored, half": {"config": LOW, "capacity": 0.5},
    "hooks, six tenths": {"config": FULL, "capacity": 0.6, "engine": HOOKS},
    "hooks, anchored, six tenths": {"config": LOW, "capacity": 0.6, "engine": HOOKS},
}
BATCHES = {
    name: {"command": "batches", "search": {"readers": "m2"}, "n": 8, **scenario}
    for name, scenario in BATCHES.items()
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_does_not_fit_is_computed_in_parts(name: str) -> None:
    """The values are the CPU's, with a share of the memory that the batch takes where it has all it wants."""
    outcome = rehearsed(BEST, BATCHES, name)
    assert not outcome["failed"], outcome["failed"]
    assert outcome["error"] < 1e-6


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
