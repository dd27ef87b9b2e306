"""What the command line prints: one JSON object, or tables."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from pahq_hf.circuit.files import (
    ANSWERS_NAME,
    CIRCUIT_NAME,
    DIRECTION_NAMES,
    JOURNAL_NAME,
    SWEEP_NAME,
    SWEEP_PREFIX,
)
from pahq_hf.circuit.terminal import Terminated, ending, printable
from pahq_hf.errors import PAHQError

if TYPE_CHECKING:
    from pahq_hf.circuit.circuit import Circuit

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]

UNVERIFIED = 1  # exit code


def print_json(document: dict[str, Any]) -> None:
    """One JSON object on stdout, on one line; a number that JSON has not, such as NaN, is null."""
    sys.stdout.write(json.dumps(_finite(document), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {_key(name): _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _key(name: object) -> object:
    """A key that is a number which JSON has not, as text."""
    return repr(name) if isinstance(name, float) and not math.isfinite(name) else name


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Facts as JSON or as a table."""
    if as_json:
        print_json(facts)
        return
    from pahq_hf.cli.tables import facts_table

    print_rich(facts_table(facts))


def print_rich(*tables: Any) -> None:
    """Tables for people, on the terminal when this returns; no text in them can steer it."""
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.segment import Segment

    class Printable:
        def __init__(self, table: Any) -> None:
            self.table = table

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for segment in console.render(self.table, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    console = Console()
    for table in tables:
        console.print(Printable(table))
    console.file.flush()


def say_resumed(out: Path, what: str, *, finished: bool, **ignored: object) -> None:
    """Say on stderr what --resume finds where that is no run to continue.

    Args:
        out: Its folder.
        what: What it is called.
        finished: Whether all that is asked for is there.
        **ignored: Options that a finished one has no use for; None where they were not given.
    """
    given = " and ".join(f"--{name}" for name, value in ignored.items() if value is not None)
    kept = CIRCUIT_NAME, JOURNAL_NAME, ANSWERS_NAME, SWEEP_NAME
    begun = any(os.path.exists(out / part / name) for part in ("", *DIRECTION_NAMES) for name in kept)
    if not begun:
        text = f"no {what} in {out} yet: starting one"
    elif given and finished:
        text = f"a finished {what} in {out} is returned as it is: it needs no {given}"
    else:
        return
    sys.stderr.write(f"pahq: {printable(text)}\n")


@contextmanager
def verdict_in_table(printed: bool) -> Iterator[None]:
    """Keep the verdict on a circuit out of the log, where the table that follows says it.

    Args:
        printed: Whether there is a table.
    """
    from pahq_hf.circuit.verdict import logger

    def passes(_: logging.LogRecord) -> bool:
        return not printed

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def exit_unverified(*circuits: Circuit) -> None:
    """End with exit code 1 if the hooks engine did not confirm a result, and say so on stderr."""
    texts = [text for circuit in circuits if (text := circuit.record.doubt)]
    for text in texts:
        sys.stderr.write(f"pahq: {printable(text)}\n")
    if texts:
        raise typer.Exit(UNVERIFIED)


# -- a stdout that cannot be written ----------------------------------------------------------------


class OutputError(PAHQError):
    """Stdout cannot be written."""


class ClosedPipe(OutputError):
    """Whoever read stdout has read enough."""


class _Output:
    """Stdout whose errors can be told from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _told():
            return self._stream.write(text)

    def flush(self) -> None:
        with _told():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = ClosedPipe if error.errno == errno.EPIPE else OutputError
        raise kind(f"cannot write to stdout: {error.strerror or error}") from error


@contextmanager
def written_output() -> Iterator[None]:
    """Have all that a block prints on stdout written when it ends.

    Raises:
        ClosedPipe: If a pipe's reader is gone.
        OutputError: If stdout cannot be written for another reason.
    """
    stream: TextIO | None = sys.stdout
    if stream is None:
        raise OutputError("cannot write to stdout: it is closed")
    if isinstance(stream, TextIOWrapper):  # one in ASCII, say, shows what it has not as Python writes it
        stream.reconfigure(errors="backslashreplace")
    sys.stdout = cast(TextIO, _Output(stream))
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = stream
        _drop_unwritten(stream)


def _drop_unwritten(stream: TextIO) -> None:
    """Let what cannot be written go nowhere: Python would try again when it ends, and complain."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()


def keeps_journal(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command with a folder `out` that is interrupted tell whether a journal is in it."""

    @wraps(command)
    def told(**options: Any) -> None:
        try:
            command(**options)
        except (Exception, KeyboardInterrupt, Terminated) as stop:
            number = stop.number if isinstance(stop, Terminated) else ending()
            if isinstance(stop, KeyboardInterrupt):
                number = int(signal.SIGINT)
            if number is None:
                raise
            out = Path(options["out"])
            kept = (out / JOURNAL_NAME).exists() or any(out.glob(f"{SWEEP_PREFIX}*/{JOURNAL_NAME}"))
            raise Terminated(number, kept=kept) from None

    return told
