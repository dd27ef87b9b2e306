"""Bars of the libraries that load models: only where somebody sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from pahq_hf.circuit.terminal import is_watched


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


@contextmanager
def conversion_bar() -> Iterator[None]:
    """The same of transformers' bar while a GGUF file is converted, which none of its settings turns off."""
    from transformers import modeling_gguf_pytorch_utils

    conversion: Any = modeling_gguf_pytorch_utils
    bar = getattr(conversion, "tqdm", None)
    if bar is None or is_watched():
        yield
        return
    conversion.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        conversion.tqdm = bar
