"""What the command line says of an error that nobody raised on purpose: one line, and a report to send."""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from pahq_hf.errors import first_line, source_of

TRACEBACK = "PAHQ_TRACEBACK"  # set to show where code failed
BAD_INPUT, BUG = 2, 70  # EX_SOFTWARE of sysexits.h: nobody takes it for a finished run
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Of libraries that do not raise MemoryError, and of the loader of shared ones.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "failed to map segment")
_SECRETS = ("--token",)
_PACKAGES = ("pahq_hf", "torch", "transformers", "torchao", "tokenizers", "safetensors", "huggingface_hub")


def explained(error: BaseException) -> tuple[str, int]:
    """One line for an error that was not raised on purpose, and the exit code.

    Where it is the package's own a report is written; with `PAHQ_TRACEBACK` its traceback is shown too.

    Args:
        error: The error.
    """
    source = source_of(error)
    if source is None and (known := _of_the_machine(error)) is not None:
        return known, BAD_INPUT
    shown = bool(os.environ.get(TRACEBACK))
    if shown:
        traceback.print_exception(error)
    said = f"{type(error).__name__}: {first_line(error)}"
    if source is not None:
        return f"{source} failed: {said}{'' if shown else f'; {TRACEBACK}=1 shows where'}", BAD_INPUT
    report = write_report(error)
    told = f"; {report} has what to send" if report is not None else ""
    return f"internal error, please report it: {said}{told}", BUG


def _of_the_machine(error: BaseException) -> str | None:
    """What a machine ran out of, in one line; None if that is not it."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = "" if error.filename is None else f" for {error.filename}"
        return f"the disk is full: no room{where}; free some, or set TMPDIR and --out to where there is"
    said = str(error).lower()
    if isinstance(error, MemoryError) or error_is(error, errno.ENOMEM) or any(t in said for t in _NO_MEMORY):
        return (
            f"memory ran out ({first_line(error)}): take fewer or shorter prompts (--n), weights in a "
            "smaller format, or a larger machine"
        )
    return None


def error_is(error: BaseException, number: int) -> bool:
    """Whether an error is one of the system with this number."""
    return isinstance(error, OSError) and error.errno == number


def write_report(error: BaseException) -> str | None:
    """Write what whoever mends it needs: command, versions and traceback, in a new file for its owner only.

    Args:
        error: The error.

    Returns:
        The file; None where none can be written.
    """
    lines = [
        f"pahq {' '.join(without_secrets(sys.argv[1:]))}",
        f"Python {platform.python_version()} on {platform.platform()}",
        *(f"{name} {_version(name)}" for name in _PACKAGES),
        "",
        *traceback.format_exception(error),
    ]
    try:
        opened, name = tempfile.mkstemp(prefix="pahq-", suffix=".log")
        with os.fdopen(opened, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(line.rstrip("\n") for line in lines) + "\n")
    except OSError:
        return None
    return name


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command's arguments, with tokens left out."""
    found = []
    hidden = False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        found.append("***" if hidden else f"{option}=***" if equals and option in _SECRETS else argument)
        hidden = argument in _SECRETS
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"
