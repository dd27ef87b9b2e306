"""Installed packages that add metrics, formats, families or searches to the command line."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from pahq_hf.circuit.terminal import printable
from pahq_hf.errors import first_line

GROUP = "pahq_hf"


def load_extensions() -> None:
    """Import what installed packages name in the entry-point group `pahq_hf`; it registers what it adds.

    One that fails is told of on stderr, and what it would have added is unknown.
    """
    for entry in sorted(entry_points(group=GROUP)):
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # one that exits would end the command
            package = entry.dist.name if entry.dist is not None else "an unknown package"
            reason = f"{type(error).__name__}: {first_line(error) if str(error) else 'no reason given'}"
            told = f"extension {entry.name} of {package} was not loaded: {reason}"
            sys.stderr.write(f"pahq: {printable(told)}\n")
