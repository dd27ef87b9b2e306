"""What is said on stderr while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def is_watched() -> bool:
    """Whether somebody sees stderr as it is written: a terminal, or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextmanager
def library_bars() -> Iterator[None]:
    """Let transformers and the Hub draw bars only where somebody sees them; in a file they are noise."""
    from transformers.utils import logging

    if is_watched() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
