"""How a run ends on the command line: where its result lies, and the command that comes next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pahq_hf.circuit.terminal import printable

if TYPE_CHECKING:
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.circuit.verdict import Verdict

_NEVER = ("token", "as_json", "resume", "take_over")  # a secret, and what is of one call
_DATA = ("columns", "on_mismatch", "answer_tokens", "chat_template")
_EVALUATES = (
    *("task", "n", "split", "shuffle", *_DATA),
    *("gguf_file", "revision", "trust_remote_code", "device"),
)


def again(context: typer.Context, **changes: Any) -> str:
    """The command that ran, with other values of some options.

    Args:
        context: Of the command.
        **changes: New values by parameter; None leaves the option away.

    Returns:
        The command, quoted for a shell.
    """
    words = ["pahq", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in changes:
            words += _words(parameter, changes[name])
        elif name not in _NEVER and is_given(context, name):
            words += _words(parameter, context.params[name])
    return shlex.join(words)


def evaluation(context: typer.Context, folder: Path, circuit: Circuit, *more: str) -> str:
    """The command that judges a run's circuit on prompts that were not searched on.

    Args:
        context: Of the command that found it.
        folder: Where the circuit is.
        circuit: The circuit.
        *more: Options of that command.

    Returns:
        The command, quoted for a shell; where the data has no more prompts, that which shows the circuit.
    """
    from pahq_hf.tasks.loading import is_generated

    total, seed = circuit.record.task.total or 0, context.params["seed"]
    if is_generated(str(context.params["task"])):
        unseen = ["--seed", str((seed or 0) + 1)]
    else:
        behind = context.params["offset"] + (context.params["n"] or total)
        if behind >= total:
            return shlex.join(["pahq", "show", str(folder), "--html", f"{folder}.html"])
        unseen = [*([] if seed is None else ["--seed", str(seed)]), "--offset", str(behind)]
    words = ["pahq", "evaluate", str(folder), "--model", str(context.params["model"]), *more]
    for parameter in context.command.params:
        if parameter.name in _EVALUATES and is_given(context, parameter.name):
            words += _words(parameter, context.params[parameter.name])
    return shlex.join([*words, *unseen])


def after(
    verdict: Verdict | None, good: Callable[[], str], more: Callable[[], str], fewer: Callable[[], str]
) -> str:
    """The command that comes next.

    Args:
        verdict: What the run says of its circuit.
        good: What to do with a circuit that does what the model does.
        more: How to keep more edges.
        fewer: How to keep fewer.
    """
    if verdict is not None and verdict.kind == "whole":
        return fewer()
    return more() if verdict is not None and verdict.poor else good()


def beside(folder: Path, name: str) -> Path:
    """A folder for another run that is not there yet."""
    path, number = folder.with_name(f"{folder.name}-{name}"), 1
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}-{name}-{number}")
    return path


def print_end(folder: Path, command: str) -> None:
    """Say where the result is and what comes next; not as a table, whose lines would break."""
    sys.stdout.write(f"\nResult: {printable(str(folder))}\nNext:   {printable(command)}\n")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, be it with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _words(parameter: Any, value: Any) -> list[str]:
    """A parameter as it is typed."""
    if value is None:
        return []
    if parameter.param_type_name == "argument":
        return [str(value)]
    option = max(parameter.opts, key=len)
    if parameter.is_flag:
        return [option] if value else parameter.secondary_opts[:1]
    values = value if isinstance(value, list | tuple) else [value]
    return [word for one in values for word in (option, str(one))]
