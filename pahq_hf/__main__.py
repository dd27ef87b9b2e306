"""The `pahq` command, also for launchers such as torchrun that take a module.

Nothing is imported at load but what Python has loaded anyway: Ctrl-C while libraries are imported, which
takes a second, would end in a traceback out of the midst of them.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_INTERRUPTED, _BUG = 130, 70


def main() -> None:
    """Entry point of the console script."""
    taken = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if taken:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        from pahq_hf.cli.app import main as run
    except Exception as error:  # too little memory for its libraries, or half an installation
        said = (str(error).strip().splitlines() or ["no reason given"])[0]
        sys.exit(_say(f"cannot start: {type(error).__name__}: {said}", _BUG))
    if taken:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _end_at_once(_: int, __: FrameType | None) -> NoReturn:
    os._exit(_say("interrupted", _INTERRUPTED))


def _say(text: str, code: int) -> int:
    """Write a line to stderr, where there is one. Returns the code."""
    try:
        os.write(2, f"pahq: {text}\n".encode(errors="backslashreplace"))
    except OSError:
        return code
    return code


if __name__ == "__main__":
    main()
