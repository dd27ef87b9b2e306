"""JSON from files of others: of bounded size, depth and numbers, and from regular files only."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from pahq_hf.errors import CircuitError

MAX_BYTES = 1 << 30  # of a file that is worth reading
OWN_BYTES = 1 << 40  # of what a run wrote here, which may be as long as the run
_DEEPEST = 100  # objects within each other; what this package and its like write has less than ten
LARGEST_FLOAT = 10**308  # whole numbers beyond it are no floats either
_LARGEST_COUNT = 2**63 - 1


def check_regular(path: Path) -> None:
    """Check that a library may open a file.

    Raises:
        OSError: If there is none, or what is there is no regular file.
    """
    _check_mode(os.stat(path).st_mode)


def _check_mode(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no file, but a device, a pipe or a socket")


def read_regular(path: Path, most: int = MAX_BYTES) -> bytes:
    """What a regular file holds.

    Opening a pipe would wait for its other end, and reading a device may never end.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        OSError: If it cannot be read, is larger, or is no regular file.
    """
    # Of these only POSIX has the first, and only Windows the second.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(_open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        _check_mode(status.st_mode)
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {most:,}")
        return file.read(min(most, status.st_size + 1))  # makes room for as much at once


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags)
    except ValueError as error:  # a zero in its name
        raise OSError(errno.EINVAL, str(error)) from error


def parse_json(raw: bytes | str, largest: int = _LARGEST_COUNT) -> Any:
    """A JSON document.

    Python's reader takes whole numbers of 4,300 digits, and as many levels as its stack has; what comes of
    either fails where it is used. NaN and Infinity stay, which earlier versions wrote for scores.

    Args:
        raw: Its text, in UTF-8 if it is bytes.
        largest: The largest whole number that it may hold, and the size of the least.

    Raises:
        ValueError: If it is none, is nested too deeply, or holds a larger whole number.
    """
    try:
        document = json.loads(raw if isinstance(raw, str) else raw.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    level: list[Any] = [[document]]
    for _ in range(_DEEPEST + 1):
        inner = [value for node in level for value in _values(node) if isinstance(value, (dict, list, int))]
        level = [value for value in inner if not isinstance(value, int)]
        if len(level) < len(inner) and not all(
            -largest <= value <= largest for value in inner if isinstance(value, int)
        ):
            raise ValueError(f"a whole number in it is larger than {largest:.3g}")
        if not level:
            return document
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"it is nested more than {_DEEPEST} levels deep"


def _values(node: Any) -> Any:
    """What is in an object or array."""
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of bounded size.

    Raises:
        CircuitError: If it is missing, too large, damaged, or no object.
    """
    try:
        document = parse_json(read_regular(path))
    except OSError as error:
        raise CircuitError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CircuitError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise CircuitError(f"{path} does not hold a JSON object")
    return document
