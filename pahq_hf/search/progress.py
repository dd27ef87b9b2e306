"""What is said on stderr while something takes long.

Where somebody looks, a terminal or a notebook, phases and bars are drawn over each other. A file gets plain
lines, and only of what takes long.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from pahq_hf.circuit.terminal import is_watched

_PATIENCE = 10.0  # seconds after which a phase is worth a line
_QUIET = 30.0  # seconds between two lines of a count


class Count(Protocol):
    """Work that is counted while it is done."""

    def advance(self, steps: int) -> None:
        """So many steps more are done; fewer, where some were undone."""

    def expect(self, total: int) -> None:
        """There will be so many steps altogether."""

    def note(self, **facts: object) -> None:
        """Say how things stand, beside the count."""


class Progress(Protocol):
    """Somebody who is told what goes on."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Something without a count goes on inside."""

    def count(self, name: str, unit: str, total: int, done: int = 0) -> AbstractContextManager[Count]:
        """Steps are counted inside; `done` of them were done earlier."""


def make_progress(shown: bool) -> Progress:
    """Bars where somebody looks, lines where nobody does, nothing where it is not wanted."""
    if not shown:
        return Silence()
    return Bars() if is_watched() else Lines()


class Silence:
    """Says nothing."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Nothing."""
        yield

    @contextmanager
    def count(self, name: str, unit: str, total: int, done: int = 0) -> Iterator[Count]:
        """Nothing."""
        yield self

    def advance(self, steps: int) -> None:
        """Nothing."""

    def expect(self, total: int) -> None:
        """Nothing."""

    def note(self, **facts: object) -> None:
        """Nothing."""


class Bars:
    """tqdm's bars, those of notebooks there."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A line that is gone afterwards."""
        with _tqdm()(desc=name, bar_format="{desc} ...", leave=False):
            yield

    @contextmanager
    def count(self, name: str, unit: str, total: int, done: int = 0) -> Iterator[Count]:
        """A bar that stays."""
        with _tqdm()(desc=name, unit=unit, total=total, initial=done, dynamic_ncols=True) as bar:
            yield _Bar(bar)


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, steps: int) -> None:
        self._bar.update(steps)

    def expect(self, total: int) -> None:
        self._bar.total = total

    def note(self, **facts: object) -> None:
        self._bar.set_postfix(facts, refresh=False)


class Lines:
    """A line about a phase that takes long; of a count one from time to time and one at its end.

    Args:
        clock: Seconds.
        patience: Seconds after which a phase is worth a line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, patience: float = _PATIENCE) -> None:
        self._clock = clock
        self._patience = patience

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A line once it has taken long."""
        timer = threading.Timer(self._patience, _say, [f"{name} ..."])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def count(self, name: str, unit: str, total: int, done: int = 0) -> Iterator[Count]:
        """A line from time to time, and at its end."""
        lines = _Lines(name, unit, total, done, self._clock)
        yield lines
        lines.end()


class _Lines:
    def __init__(self, name: str, unit: str, total: int, done: int, clock: Callable[[], float]) -> None:
        self._name, self._unit, self._total = name, unit, total
        self._earlier = self._done = done
        self._clock = clock
        self._began = self._said = clock()
        self._facts = ""

    def advance(self, steps: int) -> None:
        self._done += steps
        now = self._clock()
        if now - self._said < _QUIET or self._done <= self._earlier:
            return
        self._said = now
        left = max(0, self._total - self._done)
        seconds = left * (now - self._began) / (self._done - self._earlier)
        self._say(f"of about {self._total:,} {self._unit}s, about {_duration(seconds)} to go")

    def expect(self, total: int) -> None:
        self._total = total

    def note(self, **facts: object) -> None:
        self._facts = "".join(f", {name} {value}" for name, value in facts.items())

    def end(self) -> None:
        self._say(f"{self._unit}s in {_duration(self._clock() - self._began)}")

    def _say(self, text: str) -> None:
        _say(f"{self._name}: {self._done:,} {text}{self._facts}")


def _say(text: str) -> None:
    sys.stderr.write(f"pahq: {text}\n")
    sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _tqdm() -> Any:
    from tqdm.auto import tqdm

    return tqdm
