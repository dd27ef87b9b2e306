"""ACDC with verified estimates takes ACDC's decisions on random models: flips are counted."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.search.flips import Comparison, Tally

QUICK = 8
SEARCHES = 100  # `python -m tests.search.flips 2000` takes an hour


@settings(derandomize=True, max_examples=QUICK, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_decisions_are_acdcs_or_the_audit_says_that_some_are_not(seed: int) -> None:
    assert Tally.of([Comparison.of(seed)]).unseen == 0


@pytest.mark.exhaustive
def test_flips_of_many_searches(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally.of(map(Comparison.of, range(SEARCHES)))
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.estimated > 0.2 * tally.edges
    assert tally.flipped <= 0.05 * SEARCHES
    assert tally.unseen <= 0.01 * SEARCHES
