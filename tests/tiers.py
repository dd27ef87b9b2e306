"""What `make test` runs of a product of parameters, and how many examples of a property.

Of a product, enough that every value of each parameter occurs; of examples, fifteen in a hundred.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import settings

Row = Mapping[str, Hashable]


# Examples of a property that says nothing of their number, by tier; the profile of the same name has as many.
QUICK_EXAMPLES, ALL_EXAMPLES = 15, 100


def examples(number: int, **options: Any) -> settings:
    """How many examples hypothesis draws: so many in `make test-all`, fewer in `make test`."""
    return settings(max_examples=max(5, number * settings().max_examples // ALL_EXAMPLES), **options)


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Values of a parameter, of which `make test` takes the chosen ones and `make test-all` all."""
    every = list(values)
    assert set(chosen) <= set(every)
    return [value if value in chosen else exhaustive(value) for value in every]


def exhaustive(*values: Any) -> Any:
    """Values of parameters that only `make test-all` takes."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def covering(rows: Sequence[Row]) -> set[int]:
    """Numbers of some rows in which every value of every column occurs; the same ones each time.

    Rows are taken that bring most values not seen yet, so that 30 families by 3 paddings make 30 rows.
    """
    missing = {item for row in rows for item in row.items()}
    chosen: set[int] = set()
    while missing:
        best = max(range(len(rows)), key=lambda i: (len(missing & set(rows[i].items())), -i))
        chosen.add(best)
        missing -= set(rows[best].items())
    return chosen


def mark_exhaustive(items: Sequence[pytest.Item]) -> None:
    """Mark what a test that is marked `crossing` can do without in `make test`."""
    groups: dict[tuple[str, str], list[pytest.Function]] = {}
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.get_closest_marker("crossing")
            and not item.get_closest_marker("exhaustive")
        ):
            groups.setdefault((str(item.path), f"{item.cls}.{item.originalname}"), []).append(item)
    for group in groups.values():
        kept = covering([_row(item) for item in group])
        for number, item in enumerate(group):
            if number not in kept:
                item.add_marker(pytest.mark.exhaustive)


def _row(item: Any) -> Row:
    """Parameters by name: plain values as they are, others by which object they are."""
    plain = (str, int, float, bool, type(None))
    return {
        name: value if isinstance(value, plain) else f"object {id(value)}"
        for name, value in item.callspec.params.items()
    }
