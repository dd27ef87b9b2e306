"""Tasks: prompt pairs with right and wrong answers, generated for a tokenizer or loaded from data."""

from importlib import import_module
from typing import Any

_FILES = {
    "TASKS": "pahq_hf.tasks.loading",
    "available_tasks": "pahq_hf.tasks.loading",
    "load_task": "pahq_hf.tasks.loading",
    "Pair": "pahq_hf.tasks.base",
    "Task": "pahq_hf.tasks.base",
    "collate": "pahq_hf.tasks.base",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FILES[name]), name)
