"""What the tests of commands share."""

from __future__ import annotations

import pytest

from tests.cli.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Models, data and runs, good and bad; commands write below its folder `fine` and nowhere else."""
    return World(tmp_path_factory.mktemp("world"))
