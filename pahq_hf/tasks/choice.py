"""Which examples of data are taken, and what was read."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Which examples of a dataset are taken.

    Attributes:
        n: How many; all by default.
        offset: How many are passed over before.
        shuffle: Seed of the order they are put into first; None leaves them in their own.
    """

    n: int | None = None
    offset: int = 0
    shuffle: int | None = None

    def of(self, total: int) -> list[int]:
        """The numbers of the examples, of so many."""
        order = list(range(total))
        if self.shuffle is not None:
            random.Random(self.shuffle).shuffle(order)
        return order[self.offset :][: self.n]


@dataclass(frozen=True)
class Data:
    """Rows that were read.

    Attributes:
        rows: One dictionary per example.
        total: How many examples the whole dataset has.
    """

    rows: list[Row]
    total: int
