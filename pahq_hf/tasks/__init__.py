"""Tasks: prompt pairs with right and wrong answers, generated for a tokenizer or loaded from data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pahq_hf.config import MetricName
from pahq_hf.errors import TaskError
from pahq_hf.tasks.base import Pair, Task, collate
from pahq_hf.tasks.catalog import DESCRIPTIONS, TaskFacts
from pahq_hf.tasks.dataset import load_dataset_task
from pahq_hf.tasks.docstring import make_docstring
from pahq_hf.tasks.gendered_pronoun import make_gendered_pronoun
from pahq_hf.tasks.greater_than import make_greater_than
from pahq_hf.tasks.induction import make_induction
from pahq_hf.tasks.ioi import make_ioi
from pahq_hf.tasks.reading import FILE_TYPES
from pahq_hf.tasks.sva import make_sva

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS: dict[str, Callable[..., Task]] = {
    "ioi": make_ioi,
    "greater_than": make_greater_than,
    "docstring": make_docstring,
    "induction": make_induction,
    "gendered_pronoun": make_gendered_pronoun,
    "sva": make_sva,
}
"""Generators by name; `make(tokenizer, *, n, seed, padding_side)` with optional `metric`, `corruption`."""

DEFAULT_N = 50


def available_tasks() -> list[str]:
    """Names `load_task` generates.

    Returns:
        The names, sorted.
    """
    return sorted(TASKS)


def load_task(
    name_or_path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    metric: MetricName | None = None,
    padding_side: str = "right",
    corruption: str | None = None,
    split: str | None = None,
) -> Task:
    """Generate a known task or load a user's own data.

    Args:
        name_or_path: A name from `available_tasks()`, also with a corruption as in `"ioi:s2_flip"`; a
            .jsonl, .json, .csv or .parquet file; a dataset folder; or a Hub dataset id (`owner/name`). See
            `load_dataset_task` for the columns.
        tokenizer: The model's tokenizer; may be missing for data given as token ids.
        n: Number of examples. Generators make 50 by default; data is used whole, or its first `n` examples.
        seed: Seed of a generator; data is never shuffled.
        metric: Overrides the task's default metric.
        padding_side: `"right"` or `"left"`.
        corruption: How a generator (or which counterfactual of MIB data) corrupts the prompts.
        split: Split of a dataset that has several.

    Returns:
        The task, every pair of one token length and every answer one token.

    Raises:
        TaskError: If the task is unknown or its data cannot be used; the message says why.
    """
    if n is not None and n < 1:
        raise TaskError(f"n must be a positive number of examples, not {n!r}")
    if metric not in (None, *get_args(MetricName)):
        raise TaskError(f"unknown metric {metric!r}; choose from {', '.join(get_args(MetricName))}")
    options: dict[str, Any] = {"padding_side": padding_side}
    if metric is not None:
        options["metric"] = metric
    if corruption is not None:
        options["corruption"] = corruption
    text = str(name_or_path)
    name, _, variant = text.partition(":")
    if name in TASKS and not isinstance(name_or_path, Path):
        if tokenizer is None:
            raise TaskError(f"task {name!r} is generated for a tokenizer; pass the model's")
        if split is not None:
            raise TaskError(f"task {name!r} is generated and has no split {split!r}")
        if variant:
            if corruption not in (None, variant):
                raise TaskError(f"task {text!r} and corruption={corruption!r} contradict each other")
            options["corruption"] = variant
        return TASKS[name](tokenizer, n=DEFAULT_N if n is None else n, seed=seed, **options)
    path = Path(text).expanduser()
    if not text or not path.exists():
        if path.suffix.lower() in FILE_TYPES or path.is_absolute() or text.startswith(("./", "../", "~")):
            raise TaskError(f"{text}: no such file or dataset folder")
        if text.count("/") != 1:
            raise TaskError(
                f"unknown task {text!r}; known tasks are {', '.join(available_tasks())}, and a path to a "
                f"{', '.join(FILE_TYPES)} file, a dataset folder or a Hub dataset id (owner/name) works too"
            )
    return load_dataset_task(path if path.exists() else text, tokenizer, n=n, split=split, **options)


__all__ = [
    "DEFAULT_N",
    "DESCRIPTIONS",
    "TASKS",
    "Pair",
    "Task",
    "TaskFacts",
    "available_tasks",
    "collate",
    "load_dataset_task",
    "load_task",
]
