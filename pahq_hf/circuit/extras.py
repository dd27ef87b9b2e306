"""What results do not depend on: pictures, plots and cards may fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pahq_hf.errors import first_line

logger = logging.getLogger(__name__)


@contextmanager
def spared(path: Path) -> Iterator[None]:
    """Let the making of a file fail with a warning, whatever a library raises: the results are safe.

    Args:
        path: The file.
    """
    try:
        yield
    except Exception as error:
        logger.warning("%s was not made, the results do not depend on it: %s", path, first_line(error))
