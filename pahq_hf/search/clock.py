"""Seconds of a run by phase, over all its parts: a run that was interrupted took what all of them took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pahq_hf.circuit.files import SECONDS_NAME, write_text
from pahq_hf.errors import RunError

_INTERVAL = 1.0  # seconds a killed run may forget


class RunClock:
    """Counts a run's seconds, and keeps them beside its journal until it is finished.

    They are no part of the journal itself, in which the same run is the same to the byte.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._kept = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside under `name`."""
        self._running[name] = time.perf_counter()
        try:
            yield
        finally:
            started = self._running.pop(name)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far by phase."""
        now, found = time.perf_counter(), dict(self._seconds)
        for name, started in self._running.items():
            found[name] = found.get(name, 0.0) + now - started
        return found

    def take_over(self, folder: Path) -> None:
        """Add what the run in a folder has taken so far, where that is known."""
        try:
            found = json.loads((folder / SECONDS_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        for name, value in found.items() if isinstance(found, dict) else ():
            if type(value) is float and 0 <= value < float("inf"):
                self._seconds[name] = self._seconds.get(name, 0.0) + value

    def keep(self, folder: Path) -> None:
        """Keep the seconds so far in a folder; not more often than once a second.

        Raises:
            RunError: If it cannot be written.
        """
        if time.perf_counter() - self._kept >= _INTERVAL:
            self._write(folder)

    @contextmanager
    def kept(self, folder: Path | None, check: Callable[[], None]) -> Iterator[None]:
        """Keep the seconds in a folder when what is inside ends, however it does.

        Args:
            folder: The run's; None keeps none.
            check: Raises `RunError` where the folder has become another process's: nothing is written then.
        """
        try:
            yield
        finally:
            if folder is not None:
                with suppress(RunError):  # what is inside may have failed of the same: that says more
                    check()
                    self._write(folder)

    def _write(self, folder: Path) -> None:
        write_text(folder / SECONDS_NAME, json.dumps(self.seconds) + "\n")
        self._kept = time.perf_counter()

    def forget(self, folder: Path) -> None:
        """Remove what was kept: the run's facts say it now."""
        (folder / SECONDS_NAME).unlink(missing_ok=True)
