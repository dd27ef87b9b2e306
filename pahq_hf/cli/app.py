"""The `pahq` command line.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 finished but not confirmed by the hooks
engine (saved, marked), 2 bad usage or input, a search or metric of one's own that fails, a stdout that
cannot be written, or a machine without memory or disk left (one line says why), 70 an error of the package
itself (the line names a report to send), 130 interrupted by Ctrl-C (a run's journal keeps what was done), 143
by SIGTERM, 141 when a pipe's reader is gone. With `PAHQ_TRACEBACK=1` in the environment a traceback comes
before the line of what failed.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from typing import NoReturn

import typer

from pahq_hf.circuit.terminal import Terminated, ending, printable, printable_notes, terminable
from pahq_hf.cli.attribute import attribute_command
from pahq_hf.cli.compare import compare
from pahq_hf.cli.discover import discover_command
from pahq_hf.cli.evaluate import evaluate_command
from pahq_hf.cli.export import export
from pahq_hf.cli.extensions import load_extensions
from pahq_hf.cli.families import families
from pahq_hf.cli.import_ import import_command
from pahq_hf.cli.info import info_command
from pahq_hf.cli.output import ClosedPipe, written_output
from pahq_hf.cli.pull import pull
from pahq_hf.cli.push import push
from pahq_hf.cli.show import show
from pahq_hf.cli.sweep import sweep_command
from pahq_hf.cli.tasks import tasks
from pahq_hf.cli.unforeseen import BAD_INPUT, explained
from pahq_hf.errors import PAHQError, UnverifiedWarning, source_of
from pahq_hf.precision.quiet import quiet_imports
from pahq_hf.precision.threads import restored_threads, sleep_while_waiting

app = typer.Typer(
    name="pahq",
    help="Circuit discovery for Hugging Face causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_SIGNALLED = 128  # a signal's number is added
_INTERRUPTED = _SIGNALLED + 2
_PIPE_CLOSED = _SIGNALLED + 13  # what a shell shows of commands that SIGPIPE ends
_LONGEST = 1000  # of a line that says what is wrong, in characters


app.command("info")(info_command)
app.command("families")(families)
app.command("discover")(discover_command)
app.command("attribute")(attribute_command)
app.command("sweep")(sweep_command)
app.command("evaluate")(evaluate_command)
app.command("import")(import_command)
for command in (tasks, show, push, pull, export, compare):
    app.command(command.__name__.rstrip("_"))(command)


def main() -> None:
    """Entry point of the console script."""
    _quiet_start()
    kept = False
    try:
        with terminable(), printable_notes():
            code = _run()
    except Terminated as stop:
        code, kept = _SIGNALLED + stop.number, stop.kept
    if code > _SIGNALLED and code != _PIPE_CLOSED:
        rest = "; a discovery's journal is kept: continue it with --resume" if kept else ""
        _say(f"interrupted{rest}")
    if code:
        sys.exit(code)


def _run() -> int:
    """The command; its exit code."""
    try:
        # Without standalone mode Typer returns the code of its `Exit`s, the one it makes of Ctrl-C included.
        with written_output(), quiet_imports(), restored_threads():  # commands import what they need
            load_extensions()
            return app(standalone_mode=False) or 0
    except ClosedPipe:
        return _PIPE_CLOSED
    except PAHQError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt) as stop:
        if isinstance(stop.__cause__, EOFError):  # which click takes for Ctrl-D at a prompt; there are none
            _fail(*explained(stop.__cause__))
        return _INTERRUPTED
    except (SystemExit, Terminated):
        raise
    except BaseException as error:  # a panic of a library in Rust is no `Exception`
        if (signalled := ending()) is not None:  # a library may put an error in the place of ours
            return _SIGNALLED + signalled
        # Typer vendors or imports click by version; its usage errors know how to describe themselves.
        describe = getattr(error, "format_message", None)
        if source_of(error) is not None or describe is None:
            _fail(*explained(error))
        if len(sys.argv) == 1:  # the bare command, which has shown its help
            sys.exit(BAD_INPUT)
        _fail(describe().replace("Value error, ", ""))  # as the library calls what a choice is not


def _quiet_start() -> None:
    """Settings that libraries read when they are imported, and no warnings of what commands say themselves.

    The settings spare torchao the search for CUDA libraries, log files the bars of downloads, and other
    programs the cores on which threads would spin.
    """
    if sys.stderr is None:  # closed by whoever started it: what is said goes nowhere
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    os.environ.update(sleep_while_waiting())
    warnings.simplefilter("ignore", UnverifiedWarning)
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    _say(_shortened(" ".join(message.split())))
    sys.exit(code)


def _shortened(text: str) -> str:
    """A line of bounded length: what is wrong is said at its beginning or its end."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


def _say(text: str) -> None:
    """A line for people, if stderr can be written."""
    with suppress(OSError):
        sys.stderr.write(f"pahq: {printable(text)}\n")
