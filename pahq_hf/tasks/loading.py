"""Tasks: prompt pairs with right and wrong answers, generated for a tokenizer or loaded from data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Never

from pahq_hf.errors import TaskError, check_names, describe
from pahq_hf.tasks.base import Pair, Task, collate
from pahq_hf.tasks.catalog import DESCRIPTIONS, TaskFacts
from pahq_hf.tasks.dataset import load_dataset_task
from pahq_hf.tasks.docstring import make_docstring
from pahq_hf.tasks.formats import FILE_TYPES, file_type
from pahq_hf.tasks.gendered_pronoun import make_gendered_pronoun
from pahq_hf.tasks.given import is_given
from pahq_hf.tasks.greater_than import make_greater_than
from pahq_hf.tasks.induction import make_induction
from pahq_hf.tasks.ioi import make_ioi
from pahq_hf.tasks.metrics import find_metric
from pahq_hf.tasks.options import AnswerTokens, DataOptions, OnMismatch
from pahq_hf.tasks.own_metric import OwnMetric, metric_name
from pahq_hf.tasks.reading import Source, told_source
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

_OPTIONS = {"columns_of": "columns"}  # as a run calls them
DEFAULT_N = 50
MAX_N = 100_000
"""Most prompt pairs that a generator makes: a minute's work."""


def available_tasks() -> list[str]:
    """Names `load_task` generates.

    Returns:
        The names, sorted.
    """
    return sorted(TASKS)


def is_generated(name_or_path: Source) -> bool:
    """Whether `load_task` generates a task of this name; else it is data."""
    return isinstance(name_or_path, str) and name_or_path.partition(":")[0] in TASKS


def foreseen_source(name_or_path: str | Path, *, n: int | None, seed: int | None) -> dict[str, object]:
    """What a generated task will say of where its prompts are from; of data nothing is known before.

    Args:
        name_or_path: As of `load_task`.
        n: Number of examples.
        seed: Of the generator.
    """
    if not is_generated(name_or_path):
        return {}
    name, _, variant = str(name_or_path).partition(":")
    found = {"generator": name, "n": DEFAULT_N if n is None else n, "seed": seed or 0}
    return found | {"corruption": variant} if variant else found


def check_choice(
    name_or_path: Source,
    *,
    n: int | None = None,
    seed: int | None = None,
    split: str | None = None,
    offset: int = 0,
    shuffle: bool = False,
    options: DataOptions | None = None,
) -> None:
    """Check what `load_task` is told about examples, which needs neither model nor data.

    Raises:
        TaskError: If something is of another type or out of range, or an option changes nothing for this
            task.
    """
    if not isinstance(name_or_path, (str, Path)) and not is_given(name_or_path):
        raise TaskError(
            "a task is a name such as 'ioi', a data file's or a Hub dataset's name, a list of dictionaries, "
            f"a DataFrame or a datasets.Dataset; got {describe(name_or_path)}"
        )
    numbers: dict[str, object] = {
        "n": 1 if n is None else n,
        "seed": 0 if seed is None else seed,
        "offset": offset,
    }
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TaskError(f"{name} must be a whole number; got {describe(value)}")
    if n is not None and n < 1:
        raise TaskError(f"n must be a positive number of examples, not {n!r}")
    if offset < 0:
        raise TaskError(f"offset must not be negative, not {offset!r}")
    if is_generated(name_or_path):
        name = str(name_or_path).partition(":")[0]
        if n is not None and n > MAX_N:
            raise TaskError(f"task {name!r} is generated, at most {MAX_N:,} examples of it: n is {n:,}")
        if split is not None:
            raise TaskError(f"task {name!r} is generated and has no split {split!r}")
        if offset or shuffle:
            given = "offset" if offset else "shuffle"
            raise TaskError(
                f"task {name!r} is generated and takes no {given}: another seed draws other prompts"
            )
        own = next(iter(() if options is None else options.given), None)
        if own is not None:
            raise TaskError(
                f"task {name!r} is generated and takes no {_OPTIONS.get(own, own)}, which is of data"
            )
    elif seed is not None and not shuffle and _is_there(name_or_path):
        raise TaskError(
            f"{told_source(name_or_path)}: data is taken in its own order, where seed {seed} changes "
            "nothing: add --shuffle (shuffle=True), or pass over examples with --offset (offset=N)"
        )


def _is_there(source: Source) -> bool:
    """Whether there are such data, or may be on the Hub; what is not there fails when it is loaded."""
    if not isinstance(source, (str, Path)):
        return True
    text = str(source)
    return bool(text) and (text.count("/") == 1 or os.path.exists(os.path.expanduser(text)))


def load_task(
    name_or_path: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    n: int | None = None,
    seed: int | None = None,
    metric: str | OwnMetric | None = None,
    padding_side: str = "right",
    corruption: str | None = None,
    split: str | None = None,
    offset: int = 0,
    shuffle: bool = False,
    columns: Mapping[str, str] | None = None,
    on_mismatch: OnMismatch | None = None,
    answer_tokens: AnswerTokens = "one",
    chat_template: bool = False,
    **unknown: Never,
) -> Task:
    """Generate a known task or load a user's own data.

    Args:
        name_or_path: A name from `available_tasks()`, also with a corruption as in `"ioi:s2_flip"`; a
            JSON, CSV, TSV or Parquet file; a dataset folder; a Hub dataset id (`owner/name`); or a list of
            dictionaries, a DataFrame or a `datasets.Dataset`. docs/data.md has the columns.
        tokenizer: The model's tokenizer; may be missing for data given as token ids.
        n: Number of examples. Generators make 50 by default and `MAX_N` at most; data is used whole.
        seed: Seed of a generator, 0 by default, or of `shuffle`; data that is not shuffled takes none.
        metric: Overrides the task's default metric: a name, or a function of logits (`own_metric`).
        padding_side: `"right"` or `"left"`.
        corruption: How a generator (or which counterfactual of MIB data) corrupts the prompts.
        split: Split of a dataset that has several.
        offset: Examples of the data that are passed over before: what a search has not seen lies behind its
            own.
        shuffle: Put the data into another order first, drawn from `seed`.
        columns: The data's names of columns by ours, `{"clean": "Q", "answer": "A"}`.
        on_mismatch: What is done with a row of data that cannot be used, such as prompts that tokenise to
            different lengths: `"error"`, the default, names it; `"skip"` leaves it out; `"pad"` fills shorter
            corrupted prompts and leaves out the rest.
        answer_tokens: What is scored of answers of several tokens: `"one"` refuses them, `"first"` scores the
            first token in which answers and distractors differ, `"whole"` all tokens one after the other.
        chat_template: Put prompts of data, messages or text, into the tokenizer's chat template.
        **unknown: Nothing else is taken.

    Returns:
        The task, every pair of one token length and every answer one token.

    Raises:
        ConfigError: If an option is unknown; the message names the nearest right one.
        MetricError: If the metric is unknown.
        TaskError: If the task is unknown or its data cannot be used; the message says why.
    """
    taken = signature(load_task).parameters.values()
    check_names(unknown, [option.name for option in taken if option.kind is option.KEYWORD_ONLY], "load_task")
    data_options = DataOptions(columns, on_mismatch, answer_tokens, chat_template)
    check_choice(
        name_or_path, n=n, seed=seed, split=split, offset=offset, shuffle=shuffle, options=data_options
    )
    n, seed, offset = None if n is None else int(n), None if seed is None else int(seed), int(offset)
    metric = metric_name(metric)
    if metric is not None:
        find_metric(metric)
    options: dict[str, Any] = {"padding_side": padding_side}
    if metric is not None:
        options["metric"] = metric
    if corruption is not None:
        options["corruption"] = corruption
    order = (seed or 0) if shuffle else None

    def load(source: Source) -> Task:
        where: dict[str, Any] = {"n": n, "split": split, "offset": offset, "shuffle": order}
        return load_dataset_task(source, tokenizer, options=data_options, **where, **options)

    if not isinstance(name_or_path, (str, Path)):
        return load(name_or_path)
    text = str(name_or_path)
    name, _, variant = text.partition(":")
    if is_generated(name_or_path):
        if tokenizer is None:
            raise TaskError(f"task {name!r} is generated for a tokenizer; pass the model's")
        if variant:
            if corruption not in (None, variant):
                raise TaskError(f"task {text!r} and corruption={corruption!r} contradict each other")
            options["corruption"] = variant
        generate = partial(TASKS[name], tokenizer, **options)

        def more(count: int, seed: int) -> Task:
            return generate(n=count, seed=seed)

        return generate(n=DEFAULT_N if n is None else n, seed=seed or 0).drawn_by(more)
    path = Path(os.path.expanduser(text))
    if not text or not os.path.exists(path):
        if file_type(path) in FILE_TYPES or path.is_absolute() or text.startswith(("./", "../", "~")):
            raise TaskError(f"{text}: no such file or dataset folder")
        if text.count("/") != 1:
            raise TaskError(
                f"unknown task {text!r}; known tasks are {', '.join(available_tasks())}, and a path to a "
                f"{', '.join(FILE_TYPES)} file, a dataset folder or a Hub dataset id (owner/name) works too"
            )
    return load(path if os.path.exists(path) else text)


__all__ = [
    "DEFAULT_N",
    "DESCRIPTIONS",
    "MAX_N",
    "TASKS",
    "Pair",
    "Task",
    "TaskFacts",
    "available_tasks",
    "check_choice",
    "collate",
    "is_generated",
    "load_dataset_task",
    "load_task",
]
