"""What a run took, over all its parts: a run that was interrupted took what all of them took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from pahq_hf.circuit.files import SECONDS_NAME, write_text
from pahq_hf.circuit.json_reader import parse_json, read_regular
from pahq_hf.engine.phases import Phases
from pahq_hf.errors import RunError

_INTERVAL = 1.0  # seconds a killed run may forget


class RunClock:
    """Counts a run's seconds by phase, and keeps them beside its journal until it is finished.

    With them it keeps how often its parts did something, such as computing a value. They are no part of the
    journal itself, in which the same run is the same to the byte. Phases may lie within each other: a second
    counts for the innermost one.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._parts: list[tuple[str, Phases]] = []
        self._running: list[str | None] = []
        self._since = 0.0  # when the innermost one began to count
        self._kept = time.perf_counter()
        self._earlier: dict[str, int] = {}  # what earlier parts have counted
        self._counting: Callable[[], Mapping[str, int]] = dict

    @contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        """Count the time inside under `name`, or not at all."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def elsewhere(self) -> AbstractContextManager[None]:
        """Do not count the time inside: another clock does."""
        return self.phase(None)

    def _turn(self) -> None:
        """Let what has run so far count for the innermost phase."""
        now = time.perf_counter()
        self._count(self._seconds, now)
        self._since = now

    def _count(self, seconds: dict[str, float], now: float) -> None:
        name = self._running[-1] if self._running else None
        if name is not None:
            seconds[name] = seconds.get(name, 0.0) + now - self._since

    def watch(self, name: str, parts: Phases) -> None:
        """Take what goes on inside a phase from somebody who counts it: it is under `name.part`."""
        self._parts.append((name, parts))

    def release(self) -> None:
        """Take over what the watched have counted; they count anew, for others."""
        for name, parts in self._parts:
            for part, value in parts.take().items():
                key = f"{name}.{part}"
                self._seconds[key] = self._seconds.get(key, 0.0) + value
        self._parts.clear()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far by phase, and by part of a phase."""
        found = dict(self._seconds)
        self._count(found, time.perf_counter())
        for name, parts in self._parts:
            for part, value in parts.seconds.items():
                found[f"{name}.{part}"] = found.get(f"{name}.{part}", 0.0) + value
        return found

    def count_by(self, counting: Callable[[], Mapping[str, int]]) -> None:
        """Take what this part of the run has done so far from somebody who counts it."""
        self._counting = counting

    @property
    def counts(self) -> dict[str, int]:
        """How often all parts of the run did something, by what it is."""
        now = self._counting()
        return {name: self._earlier.get(name, 0) + now.get(name, 0) for name in {**self._earlier, **now}}

    def report(self) -> dict[str, float]:
        """The seconds of a run at its end, rounded: its phases, their `total`, and their parts."""
        found = self.seconds
        phases = {name: value for name, value in found.items() if "." not in name}
        parts = {name: value for name, value in found.items() if "." in name}
        listed = phases | {"total": sum(phases.values())} | parts
        return {name: round(value, 3) for name, value in listed.items()}

    def take_over(self, folder: Path) -> None:
        """Add what the run in a folder has taken so far, where that is known.

        An earlier version kept seconds alone.
        """
        try:
            found = parse_json(read_regular(folder / SECONDS_NAME))
        except (OSError, ValueError):
            return
        for name, value in found.items() if isinstance(found, dict) else ():
            if type(value) is float and 0 <= value < float("inf"):
                self._seconds[name] = self._seconds.get(name, 0.0) + value
            elif type(value) is int and value >= 0:
                self._earlier[name] = self._earlier.get(name, 0) + value

    def add(self, seconds: Mapping[str, object]) -> None:
        """Add what a finished part of the run took, as `report` says it."""
        for name, value in seconds.items():
            if name != "total" and isinstance(value, (int, float)):
                self._seconds[name] = self._seconds.get(name, 0.0) + value

    def keep(self, folder: Path) -> None:
        """Keep what it has taken so far in a folder; not more often than once a second.

        Raises:
            RunError: If it cannot be written.
        """
        if time.perf_counter() - self._kept >= _INTERVAL:
            self._write(folder)

    @contextmanager
    def saving(self, folder: Callable[[], Path | None], check: Callable[[], None]) -> Iterator[None]:
        """Keep what it has taken in a folder when what is inside ends, however it does.

        Args:
            folder: Says at the end where the run's journal is; None keeps none.
            check: Raises `RunError` where the folder has become another process's: nothing is written then.
        """
        try:
            yield
        finally:
            where = folder()
            if where is not None:
                with suppress(RunError):  # what is inside may have failed of the same: that says more
                    check()
                    self._write(where)

    def _write(self, folder: Path) -> None:
        write_text(folder / SECONDS_NAME, json.dumps(self.seconds | self.counts) + "\n")
        self._kept = time.perf_counter()

    def forget(self, folder: Path) -> None:
        """Remove what was kept: the run's facts say it now."""
        (folder / SECONDS_NAME).unlink(missing_ok=True)
