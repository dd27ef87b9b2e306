"""What systems do in ways of their own: syncing a file, telling a process, room on the disk.

POSIX has calls that Windows lacks, and some that mean something else there.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

_ON_WINDOWS = sys.platform == "win32"
_QUERY = 0x1000  # PROCESS_QUERY_LIMITED_INFORMATION
_STILL_ACTIVE = 259
_DENIED = 5  # ERROR_ACCESS_DENIED
_BLOCK = bytes(1 << 20)


def sync(path: Path) -> None:
    """Let what was written to a file reach the disk.

    Windows syncs only what is open for writing; elsewhere the mode of a file may forbid to open it so.
    """
    with path.open("r+b" if _ON_WINDOWS else "rb") as file:
        os.fsync(file.fileno())


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    if _ON_WINDOWS:  # a signal of number 0 would interrupt it there
        return _is_running_on_windows(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True


def _is_running_on_windows(pid: int) -> bool:
    kernel: Any = vars(ctypes)["windll"].kernel32
    handle = kernel.OpenProcess(_QUERY, False, pid)
    if not handle:
        return bool(kernel.GetLastError() == _DENIED)  # another user's
    try:
        code = ctypes.c_ulong()
        kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        return code.value == _STILL_ACTIVE
    finally:
        kernel.CloseHandle(handle)


def allocate(number: int, start: int, size: int) -> None:
    """Take room on the disk for a part of a file, so that it can be mapped and written without running out.

    Args:
        number: The open file.
        start: Where the part begins, at the file's end.
        size: Its bytes.

    Raises:
        OSError: If there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(number, start, size)
        return
    os.lseek(number, start, os.SEEK_SET)  # macOS and Windows: what is written has room
    while size > 0:
        size -= os.write(number, _BLOCK[:size])


def give_to(path: Path, status: os.stat_result) -> None:
    """Give a file to the owner of another one, where the system has owners and lets us."""
    if hasattr(os, "chown"):
        try:
            os.chown(path, status.st_uid, status.st_gid)
        except PermissionError:
            return  # only root gives files away
