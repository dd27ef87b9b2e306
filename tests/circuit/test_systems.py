"""What other systems lack, taken away here."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pahq_hf.capture.store import DiskStore
from pahq_hf.circuit import systems
from pahq_hf.circuit.files import write_text
from pahq_hf.errors import RunError
from pahq_hf.precision.device_memory import free_memory
from pahq_hf.search.lock import RunLock, _alone


def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "_ON_WINDOWS", True)


def test_files_are_synced_where_that_takes_a_handle_to_write_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(number: int) -> None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        synced.append(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match="Bad file descriptor"):  # so it was on Windows
        write_text(tmp_path / "a", "text")
    on_windows(monkeypatch)
    monkeypatch.delattr(os, "chown")
    for text in ("text", "again"):
        write_text(tmp_path / "a", text)
    assert (tmp_path / "a").read_text() == "again" and len(synced) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_activations_have_room_where_none_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    store, like = DiskStore(), torch.empty(0)
    large = store.empty((700, 500), like).copy_(
        torch.arange(350_000.0).reshape(700, 500)
    )  # more than a block
    small = store.empty((3,), like).fill_(7)
    assert large[-1, -1] == 349_999 and small.tolist() == [7, 7, 7] and large[0, 0] == 0

    def full(number: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunError, match="No space left"):
        store.empty((3,), like)


def test_a_process_is_told_without_interrupting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal of number 0 is Ctrl-C on Windows."""
    exits, closed = {7: 259, 8: 0}, []

    def exit_code(handle: int, place: Any) -> int:
        place._obj.value = exits[handle]
        return 1

    kernel = SimpleNamespace(
        OpenProcess=lambda access, inherits, pid: pid if pid in exits else 0,
        GetLastError=lambda: 5 if errors else 87,
        GetExitCodeProcess=exit_code,
        CloseHandle=closed.append,
    )
    errors: list[int] = []
    on_windows(monkeypatch)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signalled"))
    assert [systems.is_running(pid) for pid in (7, 8, 9)] == [True, False, False] and closed == [7, 8]
    errors.append(5)  # of another user, who may not be asked
    assert systems.is_running(9)


def test_folders_are_locked_without_locks_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    inside, most = [], []

    def enter() -> None:
        for _ in range(5):
            with _alone(tmp_path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 20 and not list(tmp_path.iterdir())
    left = tmp_path / ".run.lock.held"  # of a process that was killed just then
    left.touch()
    os.utime(left, (time.time() - 60,) * 2)
    with RunLock(tmp_path), pytest.raises(RunError, match="in use"), RunLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_memory_that_a_system_does_not_tell_is_taken_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr("builtins.open", missing)
    assert free_memory(torch.device("cpu")) == 1 << 30
