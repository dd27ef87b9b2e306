"""What the tests of searches share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import wrapped
from tests.search.runs import discover


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the tiny Llama; nothing may change it."""
    folder = tmp_path_factory.mktemp("run") / "out"
    discover(wrapped("llama"), folder)
    return folder
