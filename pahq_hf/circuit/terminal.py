"""What reaches a terminal: text from models, data and circuits must not steer it."""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

# Controls but for tab and line feed, marks that turn the direction of text around, other line ends, halves of
# characters that no encoding has.
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def printable(text: str) -> str:
    """Text with what could steer a terminal made visible, as Python writes it in a string."""
    return _STEERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@contextmanager
def printable_notes() -> Iterator[None]:
    """Let nothing in log records and warnings steer the terminal while a block runs.

    Libraries log names from files, too. The colours of their own go with them.
    """
    make, show = logging.getLogRecordFactory(), warnings.formatwarning

    def make_printable(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = printable(_COLOURS.sub("", record.getMessage())), None
        return record

    def show_printable(*args: Any, **kwargs: Any) -> str:
        return printable(show(*args, **kwargs))

    logging.setLogRecordFactory(make_printable)
    warnings.formatwarning = show_printable
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        warnings.formatwarning = show


_ENDING: ContextVar[int | None] = ContextVar("ending", default=None)


class Terminated(BaseException):
    """A signal asks the process to end.

    Attributes:
        number: The signal.
        kept: Whether a journal is there to go on with.
    """

    def __init__(self, number: int, *, kept: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.kept = kept


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a block like Ctrl-C does, so that locks and temporary files go.

    A second one ends the process at once. Signals that are ignored, as under nohup, stay so.

    Raises:
        Terminated: When one comes.
    """

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        _ENDING.set(number)
        raise Terminated(number)

    def interrupt(number: int, _: FrameType | None) -> None:
        _ENDING.set(number)
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [signal.Signals[name] for name in names]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main one gets signals
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    noted = bool(numbers) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if noted:
        signal.signal(signal.SIGINT, interrupt)
    before = _ENDING.set(None)
    try:
        yield
    finally:
        _ENDING.reset(before)
        if noted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def ending() -> int | None:
    """The signal that asked the process to end; None if none did.

    A compiled library that calls Python, as safetensors does, may put an error of its own in the place of
    `Terminated`.
    """
    return _ENDING.get()


def is_watched() -> bool:
    """Whether somebody sees stderr as it is written: a terminal, or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
