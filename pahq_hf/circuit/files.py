"""Writing files so that a reader never sees half of one: write beside it, sync, rename."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pahq_hf.circuit.json_reader import MAX_BYTES, parse_json, read_json
from pahq_hf.circuit.systems import give_to, is_running, sync
from pahq_hf.errors import CircuitError, ConfigError, RunError, describe

# What a run's folder holds.
CIRCUIT_NAME = "circuit.json"
SCORES_NAME = "scores.safetensors"
DISCOVERY_NAME = "discovery.json"
MEANS_NAME = "means.safetensors"
PICTURE_NAME = "circuit.png"
JOURNAL_NAME = "journal.jsonl"
SCREEN_NAME = "screen.safetensors"
LEARNED_NAME = "learned.safetensors"
SECONDS_NAME = "seconds.json"  # until it is finished
LOCK_NAME = "run.lock"  # while a process works in it
ANSWERS_NAME = "answers.jsonl"  # of a sweep
SWEEP_NAME = "sweep.json"
SWEEP_PREFIX = "tau-"  # of its runs' folders
DIRECTION_NAMES = ("noising", "denoising")  # folders of the two runs of a search in both directions
PARETO_NAMES = ("pareto.png", "pareto.svg", "pareto.html")  # pictures of a sweep
# Folders of a search with a bootstrap: the run of the task as it is, each resample's, their consensus.
ORIGINAL_NAME, RESAMPLE_PREFIX, CONSENSUS_NAME = "original", "resample-", "consensus"

_RUN_NAMES = (CIRCUIT_NAME, JOURNAL_NAME, DISCOVERY_NAME, SWEEP_NAME, ANSWERS_NAME, LOCK_NAME)  # tell a run
_REPLACED = (PICTURE_NAME, SCORES_NAME, MEANS_NAME, LEARNED_NAME, SCREEN_NAME, SECONDS_NAME, *PARETO_NAMES)

Write = Callable[[Path], None]
_LEFTOVER = re.compile(r"\.(.+)\.(\d+)-[0-9a-f]{8}\.tmp")
_DESCRIPTORS = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd|/dev/fd")
_MOST_LINKS = 40  # that a path may lead through, as for the system itself
_LONGEST = 200  # bytes of a name in that of its temporary file


def output_path(name: str | Path) -> Path:
    """Where somebody wants something written; an empty name, such as of an unset variable, is no path.

    `Path("")` would be the current folder.

    Raises:
        ConfigError: If it is empty, or no path.
    """
    given: object = name
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(f"an output takes the path of a folder or file; got {describe(given)}")
    if not str(name):
        raise ConfigError("the path of an output is empty; write . for the current folder")
    return Path(name)


def write_atomically(path: Path, write: Write) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`.

    A link is followed, a file keeps its mode, and a new one gets that of the umask. What no rename may
    replace, a device, a pipe or an open descriptor such as /dev/stdout, is written into.

    Args:
        path: The final file.
        write: Called with the temporary path.

    Raises:
        RunError: If the folder cannot be written.
    """
    write_together({path: write})


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, text_writer(text))


def text_writer(text: str) -> Write:
    """What writes a text, in UTF-8."""
    return lambda temporary: _write(temporary, text)


def write_together(files: Mapping[Path, Write]) -> None:
    """Write files that belong together: none is replaced before all are on disk.

    Args:
        files: What fills each file, as for `write_atomically`. They are put in place in this order.

    Raises:
        RunError: If one cannot be written; then all are as they were.
    """
    staged: list[tuple[Path, _Place, Path]] = []
    try:
        for path, write in files.items():
            with _explained(path):
                place = _place_of(path)
                temporary = _make_temporary(place.folder, path.name)
                staged.append((path, place, temporary))
                mode = stat.S_IMODE(temporary.stat().st_mode)
                write(temporary)
                temporary.chmod(mode)  # some libraries put a file of their own there, for the owner only
                sync(temporary)
        for path, place, temporary in staged:
            with _explained(path):
                place.take(temporary)
    finally:
        for _, _, temporary in staged:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files that processes which are gone left in a folder.

    Args:
        folder: The folder; where it cannot be read or written nothing is done.
        name: Only those of this file.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()):
            found = _LEFTOVER.fullmatch(path.name)
            if found is not None and name in (None, found[1]) and not is_running(int(found[2])):
                path.unlink(missing_ok=True)


# -- folders of runs ------------------------------------------------------------------------------


def refuse_overwrite(folder: Path, advice: str = "choose another folder") -> Path:
    """`folder`, unless it holds a run or a sweep.

    Args:
        folder: Where a run is to be written.
        advice: What to do if there is a run; where there is a sweep, only another folder will do.

    Raises:
        RunError: If there is one.
    """
    refuse_sweep(folder)
    refuse_run(folder, advice)
    refuse_others_files(folder)
    return folder


def refuse_others_files(folder: Path) -> None:
    """Check that a folder that holds no run has no files of the names that a run's are given.

    They are somebody's own. A card, README.md, is left as it is.

    Raises:
        RunError: If there is one.
    """
    if any(os.path.lexists(folder / name) for name in _RUN_NAMES):
        return
    for name in _REPLACED:
        if os.path.isfile(folder / name) and not _is_left(folder / name):
            raise RunError(
                f"{folder} holds no run, but a file {name}, which a run would replace; choose another folder"
            )


def _is_left(path: Path) -> bool:
    """Whether a file is what a run kept of its own before it had a journal."""
    if path.suffix != ".safetensors":
        return False
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(size, MAX_BYTES)))
        return "run" in header.get("__metadata__", {})
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def check_creatable(folder: Path) -> None:
    """Check that there is a folder, or that it can be made; nothing is left there.

    Raises:
        RunError: If not.
    """
    new: list[Path] = []
    place = folder
    while not os.path.exists(place) and place != place.parent:
        new.append(place)
        place = place.parent
    try:
        make_folder(folder)
    finally:
        for made in new:
            with suppress(OSError):
                made.rmdir()


def refuse_sweep(folder: Path, advice: str = "choose another folder") -> None:
    """Check that a folder holds no sweep, finished or not.

    Raises:
        RunError: If it does.
    """
    for name in (SWEEP_NAME, ANSWERS_NAME):
        if os.path.exists(folder / name):
            raise RunError(f"{folder} holds a sweep already ({name}); {advice}")


def refuse_run(folder: Path, advice: str = "choose another folder") -> None:
    """Check that a folder holds no run of a single search, finished or not.

    Raises:
        RunError: If it does.
    """
    for name in (CIRCUIT_NAME, JOURNAL_NAME, DISCOVERY_NAME):
        if os.path.exists(folder / name) and not (name == DISCOVERY_NAME and _died_while_saving(folder)):
            raise RunError(f"{folder} holds a run already ({name}); {advice}")


def _died_while_saving(folder: Path) -> bool:
    """Whether facts without a circuit are those of an attribution, which can only begin anew."""
    try:
        method = read_json(folder / DISCOVERY_NAME).get("method", "acdc")
    except CircuitError:
        return False
    return bool(method != "acdc")


def refuse_bootstrap(folder: Path) -> None:
    """Check that a folder holds no unfinished search with a bootstrap, where one without is to run.

    Raises:
        RunError: If it does.
    """
    runs = (folder / ORIGINAL_NAME / name for name in ("", *DIRECTION_NAMES))
    if any(os.path.exists(run / JOURNAL_NAME) for run in runs):
        raise RunError(
            f"{folder} holds a search with a bootstrap ({ORIGINAL_NAME}/); continue it with --resume and its "
            "--bootstrap or choose another folder"
        )


def make_folder(folder: str | Path) -> Path:
    """Create an output folder.

    Raises:
        RunError: If it cannot be created or written.
    """
    folder = output_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the output folder {folder}: {error.strerror}") from error
    return folder


# -- places -----------------------------------------------------------------------------------------


class _Place(Protocol):
    """Where a file goes."""

    @property
    def folder(self) -> Path:
        """Where its temporary file goes."""

    def take(self, temporary: Path) -> None:
        """Put a finished file there."""


@dataclass(frozen=True)
class _File:
    """A file, new or to be replaced."""

    path: Path

    @property
    def folder(self) -> Path:
        return self.path.parent

    def take(self, temporary: Path) -> None:
        with suppress(FileNotFoundError):
            status = os.stat(self.path)
            give_to(temporary, status)
            temporary.chmod(stat.S_IMODE(status.st_mode))
        temporary.replace(self.path)


@dataclass(frozen=True)
class _Stream:
    """A device, a pipe, or something that is open already, by its number if it is this process's."""

    path: Path
    descriptor: int | None = None

    @property
    def folder(self) -> Path:
        return Path(tempfile.gettempdir())

    def take(self, temporary: Path) -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        opened = os.open(self.path, os.O_WRONLY) if self.descriptor is None else os.dup(self.descriptor)
        with temporary.open("rb") as source, os.fdopen(opened, "wb") as target:
            shutil.copyfileobj(source, target)


def _place_of(path: Path) -> _Place:
    """Where a path leads.

    Raises:
        OSError: If nothing can be written there.
    """
    for _ in range(_MOST_LINKS):
        found = _DESCRIPTORS.fullmatch(os.path.realpath(path.parent))
        if found is not None and path.name.isdigit():
            own = found[1] in (None, str(os.getpid()))
            return _Stream(path, int(path.name) if own else None)
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return _File(path)
        if not stat.S_ISLNK(mode):
            break
        path = path.parent / os.readlink(path)
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return _Stream(path)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is neither a file nor a device or pipe to write to")
    if not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return _File(path)


def _make_temporary(folder: Path, name: str) -> Path:
    """An empty file with the mode of a new one; those of dead processes for the same name are removed."""
    remove_leftovers(folder, name)
    short = name.encode(errors="ignore")[:_LONGEST].decode(errors="ignore")
    temporary = folder / f".{short}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}") from error
    return temporary


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # halves of characters
