"""Peak memory of this process, from /proc."""

from __future__ import annotations

import ctypes
import ctypes.util
import threading
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_FIELDS = {"VmHWM": "rss", "RssAnon": "anonymous"}
_INTERVAL = 0.05  # seconds


def read_memory() -> dict[str, int]:
    """Peak resident and current anonymous memory in bytes; empty where /proc is not Linux's."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = file.read().splitlines()
    except OSError:
        return {}
    values = {}
    for line in lines:
        key, _, rest = line.partition(":")
        if key in _FIELDS:
            values[_FIELDS[key]] = int(rest.split()[0]) * 1024
    return values


class PeakMemory:
    """Samples anonymous memory in a thread while a block runs.

    Resident memory counts mapped checkpoint pages, which the system can drop at any time; anonymous
    memory is what the process really holds. A GPU's peak is counted by PyTorch's allocator.

    Args:
        device: Where the model is; a GPU's peak is reported too.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.anonymous = 0
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        if self._gpu is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._gpu)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, read_memory().get("anonymous", 0))
            if self._stop.wait(_INTERVAL):
                return

    def report(self) -> dict[str, int]:
        """Peaks in bytes; of a GPU what tensors took (`device`) and what PyTorch held (`device_reserved`)."""
        found = {"rss": read_memory().get("rss", 0), "anonymous": self.anonymous}
        if self._gpu is not None:
            import torch

            found["device"] = torch.cuda.max_memory_allocated(self._gpu)
            found["device_reserved"] = torch.cuda.max_memory_reserved(self._gpu)
        return found


def trim() -> None:
    """Give freed memory back to the system, where the C library is one that keeps it otherwise."""
    release = _malloc_trim()
    if release is not None:
        release(0)


@cache
def _malloc_trim() -> Any | None:
    name = ctypes.util.find_library("c")
    try:
        return None if name is None else getattr(ctypes.CDLL(name), "malloc_trim", None)
    except OSError:
        return None
