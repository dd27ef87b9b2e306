"""Imports without torchao's notices about CUDA libraries and enums, on machines it was not built for.

transformers imports torchao, so whoever imports transformers hears them; they say nothing about weights here.
They are kept back only while a block runs: loggers are left as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_NOISY = ("torchao", "torch.utils._pytree", "huggingface_hub.utils._http")  # the last tells of each retry


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep torchao's notices back while a block imports it, and the Hub client's word on each retry."""
    with quiet_loggers(*_NOISY):
        yield


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Keep back what is less than an error of some loggers while a block runs.

    Args:
        *names: Of the loggers.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
