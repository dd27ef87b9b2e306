"""`pahq tasks`: the generated tasks, and what they look like under a model's tokenizer."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq_hf.cli.options import RevisionOption, TokenOption, TrustOption, load_arguments
from pahq_hf.cli.output import JsonOption, print_json, print_rich
from pahq_hf.errors import ConfigError, ModelLoadError, TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5  # answers of one row; greater-than has dozens


def tasks(
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Show an example under this model's tokenizer: Hub id or folder."),
    ] = None,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    token: TokenOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Generated tasks, with an example of each."""
    if model is None and (revision is not None or token is not None or trust_remote_code):
        raise ConfigError("--revision, --token and --trust-remote-code are about a model: give --model too")
    from pahq_hf.cli.tables import facts_table
    from pahq_hf.tasks.catalog import DESCRIPTIONS

    rows: list[dict[str, Any]] = [asdict(facts) for facts in DESCRIPTIONS]
    if model is not None:
        from pahq_hf.checkpoint.load import load_tokenizer
        from pahq_hf.checkpoint.saved_config import load_config_of

        arguments = load_arguments(None, revision, token, trust_remote_code)
        load_config_of(model, **arguments)  # says what is wrong with a model that is not there
        tokenizer = load_tokenizer(model, **arguments)
        if tokenizer is None:
            raise ModelLoadError(f"{model!r} has no tokenizer, so no task can be generated for it")
        rows = [row | _under(tokenizer, row["name"]) for row in rows]
    if as_json:
        print_json({"model": model, "tasks": rows})
        return
    print_rich(*(facts_table(_shown(row)) for row in rows))


def _under(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    """One real pair of a task, or why there is none."""
    from pahq_hf.tasks.loading import load_task

    try:
        task = load_task(name, tokenizer, n=1)
    except TaskError as error:
        return {"available": False, "reason": str(error)}

    def texts(tokens: tuple[int, ...]) -> list[str]:
        return [str(tokenizer.decode([token])) for token in tokens]

    real = task.attention_mask[0].bool()
    return {
        "available": True,
        "clean": tokenizer.decode(task.clean_ids[0][real]),
        "corrupted": tokenizer.decode(task.corrupted_ids[0][real]),
        "tokens": int(real.sum()),
        "rows_per_example": len(task.answers),
        # Of the last row: a task with several predicts a token of its own prompt in the others.
        "answers": texts(task.answers[-1]),
        "distractors": texts(task.distractors[-1]),
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people: lists as text, long ones cut."""
    shown = {}
    for key, value in row.items():
        if key == "available":
            continue
        if isinstance(value, list | tuple):
            rest = f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else ""
            marks = repr if key in ("answers", "distractors") else str
            value = ", ".join(map(marks, value[:_SHOWN])) + rest or "none"
        shown[key.replace("_", " ")] = value
    return shown
