"""What `make test` leaves out, and that no test depends on time."""

from __future__ import annotations

import subprocess
from itertools import product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiers import covering, examples

ROOT = Path(__file__).parents[2]


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
    quick, everything = '-m "not exhaustive"', "--hypothesis-profile=exhaustive"
    assert command_of("test").replace(quick, everything) == command_of("test-all")


@pytest.mark.exhaustive
def test_the_marker_is_known(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("exhaustive")


ROWS = st.lists(
    st.fixed_dictionaries({"family": st.integers(0, 9), "padding": st.integers(0, 2)}), unique_by=repr
)


@given(ROWS)
def test_every_value_is_covered(rows: list[dict[str, int]]) -> None:
    chosen = [rows[number] for number in covering(rows)]
    for name in ("family", "padding"):
        assert {row[name] for row in chosen} == {row[name] for row in rows}


def test_a_product_costs_its_longest_side() -> None:
    rows = [dict(zip("abc", values, strict=True)) for values in product(range(9), range(3), range(2))]
    assert len(covering(rows)) == 9


@pytest.mark.crossing
@pytest.mark.parametrize("first", ["a", "b", "c"])
@pytest.mark.parametrize("second", [1, 2])
def test_the_rest_is_exhaustive(first: str, second: int, request: pytest.FixtureRequest) -> None:
    whole = [item for item in request.session.items if item.originalname == request.node.originalname]
    if len(whole) == 6:  # all were asked for, and nothing deselected
        assert sum(item.get_closest_marker("exhaustive") is None for item in whole) == 3


def test_some_of_the_examples_are_quick() -> None:
    before, counts = settings.get_current_profile_name(), {}
    for profile in ("quick", "exhaustive"):
        settings.load_profile(profile)
        counts[profile] = [settings().max_examples, *(examples(n).max_examples for n in (200, 60, 12))]
    settings.load_profile(before)
    assert counts == {"quick": [15, 30, 9, 5], "exhaustive": [100, 200, 60, 12]}


def test_examples_may_take_as_long_as_they_take() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check
