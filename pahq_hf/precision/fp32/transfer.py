"""FP32 weights on their way to a GPU while it computes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Arriving:
    """A copy on its way.

    Attributes:
        values: Where it arrives, on the GPU.
        pinned: Where it comes from; must outlive the copy.
        done: Recorded on the side stream when it has arrived.
    """

    values: Tensor
    pinned: Tensor
    done: torch.cuda.Event


class Transfer:
    """Copies weights to a GPU ahead of their use: page-locked memory, and a stream of its own.

    A thread reads the mapped file; the copy then runs beside the GPU's work, and only the stream that uses
    the values waits for it, not the host.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pahq-prefetch")
        self._coming: dict[Hashable, Future[_Arriving]] = {}

    def start(self, key: Hashable, view: Callable[[], Tensor]) -> None:
        """Begin to copy.

        Args:
            key: Names the values.
            view: Gives them as they lie in the mapped file.
        """
        if key not in self._coming:
            self._coming[key] = self._thread.submit(self._copy, view)

    def _copy(self, view: Callable[[], Tensor]) -> _Arriving:
        source = view()
        pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source)
        with torch.cuda.stream(self._stream):
            values = pinned.to(self._device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return _Arriving(values, pinned, done)

    def take(self, key: Hashable) -> Tensor | None:
        """The values in the order of the present stream, if they were started; others are dropped."""
        coming = self._coming.pop(key, None)
        if coming is None:
            return None
        arriving = coming.result()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arriving.done)
        arriving.values.record_stream(stream)
        return arriving.values

    def forget(self) -> None:
        """Drop what was started and not taken."""
        self._coming.clear()
