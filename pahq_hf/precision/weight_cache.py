"""Decoded and packed weights that stay for another use, under a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

from pahq_hf.precision.memory import trim

_TRIM = 64 << 20  # freed bytes that are given back to the system


class Sized(Protocol):
    """A value that knows its size."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""


Value = TypeVar("Value", bound=Sized)
Key = tuple[Hashable, ...]


class WeightCache:
    """Values by key, as many as fit.

    Where they do not all fit, those last used in earlier turns go first, from the oldest; then the newest:
    weights are used in a circle, and whoever lets the oldest go in a circle keeps nothing. With a turn for
    every use it is the least recently used that goes.

    Keys are tuples: whatever begins alike can be dropped together.

    Args:
        limit: Bytes they may take together; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._values: dict[Key, Any] = {}  # from the least recently used
        self._used: dict[Key, int] = {}  # in which turn
        self._of: dict[Hashable, dict[Key, None]] = {}  # keys by what they begin with
        self._turn = 0
        self._freed = 0
        self.nbytes = 0  # of all values now

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        """One with the same limit and nothing in it: everything can be made again."""
        return WeightCache(self._limit)

    def allow(self, limit: int | None) -> None:
        """Say how many bytes the values may take together."""
        self._limit = limit
        self._shrink()

    def turn(self) -> None:
        """Begin another turn."""
        self._turn += 1

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not there; kept if it fits.

        Args:
            key: Names the value.
            make: Makes it.
        """
        found = self.peek(key)
        value: Value = make() if found is None else found
        if found is None and (self._limit is None or value.nbytes <= self._limit):
            self._values[key], self._used[key] = value, self._turn
            self._of.setdefault(key[0], {})[key] = None
            self.nbytes += value.nbytes
            self._shrink()
        return value

    def peek(self, key: Key) -> Any | None:
        """The value of a key, if it is there."""
        if key not in self._values:
            return None
        value = self._values[key] = self._values.pop(key)
        self._used[key] = self._turn
        return value

    def drop(self, *beginning: Hashable) -> None:
        """Drop every value whose key begins so."""
        for key in self._with(beginning):
            self._pop(key)

    def bytes_of(self, *beginning: Hashable) -> int:
        """Bytes of the values whose key begins so."""
        return sum(self._values[key].nbytes for key in self._with(beginning))

    def clear(self) -> None:
        """Drop everything."""
        self.drop()

    def _with(self, beginning: Key) -> list[Key]:
        keys = self._of.get(beginning[0], {}) if beginning else self._values
        return [key for key in keys if key[: len(beginning)] == beginning]

    def _pop(self, key: Key) -> int:
        size = int(self._values.pop(key).nbytes)
        del self._used[key], self._of[key[0]][key]
        if not self._of[key[0]]:
            del self._of[key[0]]
        self.nbytes -= size
        return size

    def _shrink(self) -> None:
        while self._limit is not None and self.nbytes > self._limit:
            oldest, newest = next(iter(self._values)), next(reversed(self._values))
            self._freed += self._pop(oldest if self._used[oldest] < self._turn else newest)
        if self._freed > _TRIM:  # blocks of many sizes: what is freed would not be used again
            self._freed = 0
            trim()
