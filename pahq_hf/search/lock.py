"""One process at a time in a run's folder: a lock file that says whose it is.

A process of this machine is asked for by its number and the moment it started, so that a lock whose owner
was killed is free at once. Another machine, or another container, cannot be asked: its owner touches the
file as long as it lives, and a lock that nobody touched for minutes is free.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from pahq_hf.circuit.files import LOCK_NAME, remove_leftovers, write_text
from pahq_hf.circuit.json_reader import parse_json, read_regular
from pahq_hf.circuit.systems import is_running
from pahq_hf.errors import RunError

logger = logging.getLogger(__name__)
_BEAT = 20.0  # seconds between two signs of life
_HELD_NAME, _HELD = ".run.lock.held", 10.0  # while a lock is looked at and changed, seconds at most
_SILENCE = 300.0  # seconds without one after which another machine's process counts as gone


@dataclass(frozen=True)
class Owner:
    """A process that works in a folder.

    Attributes:
        pid: Its number.
        host: The name of its machine.
        realm: What its number means something in: the machine since it was booted, or a container there.
        started: When it started, as the system counts it: numbers are used again.
        token: What tells this lock from any other.
    """

    pid: int
    host: str
    realm: str
    started: str
    token: str

    @classmethod
    def new(cls) -> Owner:
        """This process."""
        return cls(os.getpid(), socket.gethostname(), _realm(), _started(os.getpid()), secrets.token_hex(8))

    @property
    def is_here(self) -> bool:
        """Whether it is of this machine, so that its process can be looked up."""
        return (self.host, self.realm) == (socket.gethostname(), _realm())

    @property
    def is_running(self) -> bool:
        """Whether a process of this machine is still the one that made the lock."""
        return is_running(self.pid) and _started(self.pid) == self.started

    def __str__(self) -> str:
        """Number and machine."""
        return f"process {self.pid} on {self.host}"


class RunLock:
    """Makes a folder this process's own while a block runs.

    The folder is made if need be, and goes again if it is empty at the end.

    Args:
        folder: The run's folder.
        take_over: Take the lock of another machine's process even if it has shown signs of life.

    Raises:
        RunError: On entering, if another process works there, or if the folder cannot be written.
    """

    def __init__(self, folder: Path, *, take_over: bool = False) -> None:
        self._folder = folder
        self._path = folder / LOCK_NAME
        self._take_over = take_over
        self._owner = Owner.new()
        self._made: list[Path] = []
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        """Take the lock."""
        self._made = _make_folders(self._folder)
        try:
            with _alone(self._folder):
                found = _read(self._path)
                check_free(self._folder, take_over=self._take_over)
                write_text(self._path, json.dumps(asdict(self._owner)) + "\n")
        except BaseException:
            self._remove_folders()
            raise
        if found is not None and not found.is_here:
            logger.warning("%s: the lock of %s is taken over", self._folder, found)
        remove_leftovers(self._folder)
        threading.Thread(target=self._beat, name="pahq lock", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back, unless it was taken over."""
        self._ended.set()
        with suppress(RunError, OSError):
            with _alone(self._folder):
                if _read(self._path) == self._owner:
                    self._path.unlink()
            self._remove_folders()

    def check(self) -> None:
        """Check that the lock is still this process's.

        Raises:
            RunError: If another process took it over.
        """
        found = _read(self._path)
        if found != self._owner:
            whose = "was removed" if found is None else f"is now that of {found}"
            raise RunError(f"the lock of this run, {self._path}, {whose}: this process stops")

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            with suppress(OSError):
                os.utime(self._path)

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # not empty
                folder.rmdir()


def check_free(folder: Path, *, take_over: bool = False) -> None:
    """Check that no other process works in a folder.

    Args:
        folder: The folder; it need not exist.
        take_over: Let another machine's process count as gone.

    Raises:
        RunError: If one does, naming it.
    """
    path = folder / LOCK_NAME
    found = _read(path) if os.path.isdir(folder) else None
    if found is None:
        return
    if found.is_here:
        if found.is_running:
            raise RunError(f"{folder} is in use by {found}: wait for it, end it, or choose another folder")
    elif not take_over and (age := _age(path)) < _SILENCE:
        raise RunError(
            f"{folder} is in use by {found}, which gave a sign of life {age:.0f} seconds ago: wait for it or "
            f"choose another folder; if it is gone, use --take-over or wait {_SILENCE:.0f} seconds"
        )


def _read(path: Path) -> Owner | None:
    """Whose lock it is; None if there is none, or what is there names nobody."""
    try:
        document = parse_json(read_regular(path))
        texts = {name: str(document[name]) for name in ("host", "realm", "started", "token")}
        return Owner(pid=int(document["pid"]), **texts)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, OverflowError):
        return None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its file system where that can be asked."""
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return math.inf  # given back meanwhile
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            now = os.fstat(file.fileno()).st_mtime
    except OSError:
        now = time.time()
    return max(0.0, now - touched)


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that were not there, from above."""
    missing = []
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            break
        missing.append(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the output folder {folder}: {error.strerror}") from error
    return missing[::-1]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Look at a folder's lock and change it while no other process does."""
    try:
        import fcntl
    except ImportError:  # Windows, where a folder cannot be opened either
        with _alone_by_file(folder / _HELD_NAME):
            yield
        return
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that cannot be read
        yield
        return
    try:
        with suppress(OSError):  # a file system without such locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


@contextmanager
def _alone_by_file(path: Path) -> Iterator[None]:
    """The same by a file that one process alone can make; of one that died in between it is taken over."""
    opened = None
    while opened is None:
        try:
            opened = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if _age(path) > _HELD:
                with suppress(OSError):
                    path.unlink()
            time.sleep(0.01)
        except PermissionError as error:  # of a file that is just going, or of the folder
            if not path.exists():
                raise RunError(f"cannot write to {path.parent}: {error.strerror}") from error
            time.sleep(0.01)
    try:
        yield
    finally:
        os.close(opened)
        with suppress(OSError):
            path.unlink()


@cache
def _realm() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""  # not Linux: the name of the machine has to do


def _started(pid: int) -> str:
    """When a process started, in the system's ticks since it was booted; empty if it does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]  # the name before, in brackets, may hold anything
    except (OSError, IndexError):
        return ""
