"""What `make test` leaves out, and that no test depends on time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]


def command_of(target: str) -> str:
    """The line that runs pytest."""
    printed = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in printed.stdout.splitlines() if " -m pytest" in line]
    return line


def test_make_test_leaves_out_the_exhaustive_tests_only() -> None:
    assert '-m "not exhaustive"' in command_of("test")
    assert command_of("test").replace(' -m "not exhaustive"', "") == command_of("test-all").replace("  ", " ")


@pytest.mark.exhaustive
def test_the_marker_is_known(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("exhaustive")


def test_examples_may_take_as_long_as_they_take() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check
