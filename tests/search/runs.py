"""A run of the tiny Llama, and copies of it that stopped on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pahq_hf import Circuit, PAHQModel, Task
from tests.helpers import journal_lines
from tests.models import random_task

TASK = random_task(batch=3, seed=21, metric="logit_diff")
TAU = 0.05


def discover(model: PAHQModel, out: Path | None = None, task: Task = TASK, **options: Any) -> Circuit:
    """A search of a model as tests here make it."""
    return model.discover(task, out=out, progress=False, **({"threshold": TAU} | options))


def interrupted(finished: Path, folder: Path, records: int, rest: bytes = b"") -> Path:
    """A copy of a run as it stood after so many readers."""
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(b"".join(journal_lines(finished)[: 1 + records]) + rest)
    return folder
