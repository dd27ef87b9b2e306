"""Where captured activations are kept: in memory, or in a memory-mapped file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pahq_hf.circuit.systems import allocate
from pahq_hf.config import StoreName
from pahq_hf.errors import RunError


class ActivationStore(Protocol):
    """Gives room for activations that live as long as an engine."""

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised room with the dtype and on the device of a tensor.

        Args:
            shape: Its shape.
            like: Gives dtype and device.

        Raises:
            RunError: If there is no room.
        """


class MemoryStore:
    """In memory."""

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised room."""
        return like.new_empty(*shape)


class DiskStore:
    """In a temporary file that is mapped into memory: the system writes its pages out when it needs room.

    The file lies in the folder for temporary files (`TMPDIR`) and has no name: it goes with the process.

    Raises:
        RunError: If the folder cannot be written.
    """

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(prefix="pahq_hf-activations-")  # noqa: SIM115
        except OSError as error:
            raise RunError(f"cannot keep activations in {tempfile.gettempdir()}: {error}") from error
        self._end = 0

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Room at the end of the file.

        Raises:
            RunError: If the disk is full.
        """
        if like.device.type != "cpu":
            raise RunError("activation_store=disk keeps activations on the CPU; the model is elsewhere")
        size = torch.Size(shape).numel() * like.element_size()
        if size == 0:
            return like.new_empty(*shape)
        try:  # writing to a mapped page the disk has no room for would kill the process
            allocate(self._file.fileno(), self._end, size)
        except OSError as error:
            raise RunError(
                f"cannot keep {size} bytes of activations in {tempfile.gettempdir()}: {error}; set TMPDIR to "
                "a folder with room, or use activation_store=ram"
            ) from error
        mapped = np.memmap(self._file, dtype=np.uint8, mode="r+", offset=self._end, shape=(size,))
        self._end += size + -size % 64
        return torch.from_numpy(mapped).view(like.dtype).view(*shape)


def make_store(name: StoreName) -> ActivationStore:
    """The store of a name: `ram` or `disk`."""
    return DiskStore() if name == "disk" else MemoryStore()


def stored(store: ActivationStore, values: Tensor) -> Tensor:
    """A copy of a tensor in a store."""
    room = store.empty(values.shape, values)
    return room.copy_(values)
