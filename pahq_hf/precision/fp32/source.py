"""Where full-precision weights come from when a few rows of them are wanted.

A model kept in low precision holds no FP32 weights; it reads the slices it needs from the safetensors
checkpoint it was loaded from (memory-mapped: untouched pages cost nothing), or, when there is no such
file, from a spill file or a copy in memory.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pahq_hf.errors import ModelLoadError

_ALIGNED = 64  # bytes


class WeightSource(Protocol):
    """Reads blocks of named matrices as they lie in the checkpoint."""

    def read(self, name: str, rows: slice, cols: slice) -> Tensor:
        """A private copy of a block, in the checkpoint's own dtype and orientation."""

    def view(self, name: str, rows: slice, cols: slice) -> Tensor:
        """The same without a copy where it can be had; for reading only."""

    def prefetch(self, name: str) -> None:
        """Let a tensor come into memory in the background."""

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of that name exists."""


class CheckpointSource:
    """Slices of one or several safetensors files.

    Args:
        files: The checkpoint's files.

    Raises:
        ModelLoadError: If a file is missing or truncated.
    """

    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, int] = {}
        self._files = files
        self._stamps: list[tuple[int, int, int]] = []
        self._handles = []
        self._spans: dict[str, tuple[int, int]] = {}  # name -> where its bytes begin, and how many
        for number, path in enumerate(files):
            try:
                self._stamps.append(_stamp(path))
                handle = safe_open(str(path), framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelLoadError(f"cannot read the checkpoint file {path}: {error}") from error
            self._handles.append(handle)
            self._where.update(dict.fromkeys(handle.keys(), number))
            self._spans |= byte_spans(path)

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointSource:
        """Itself: nothing in it changes, and an open file cannot be copied."""
        return self

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._handles[self._where[name]].get_slice(name).get_shape())

    def whole(self, name: str) -> Tensor:
        """A tensor of any shape as it lies in the mapped file; for reading only.

        Raises:
            ModelLoadError: If the file changed since it was opened.
        """
        handle = self._unchanged(name)
        tensor: Tensor = handle.get_slice(name)[...] if self.shape(name) else handle.get_tensor(name)
        return tensor

    def read(self, name: str, rows: slice, cols: slice) -> Tensor:
        """A private copy of a block, in the checkpoint's own dtype and orientation.

        Raises:
            ModelLoadError: If the file changed since it was opened.
        """
        # The slice is a view of the mapped file; clone, or a write would show through other slices.
        return self.view(name, rows, cols).clone()

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor ahead; returns at once."""
        if not hasattr(os, "posix_fadvise"):
            return  # not POSIX: the pages come when they are touched
        start, length = self._spans[name]
        try:
            with self._files[self._where[name]].open("rb") as file:
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # a hint; reading the tensor will say what is wrong

    def view(self, name: str, rows: slice, cols: slice) -> Tensor:
        """A block as it lies in the mapped file; for reading only.

        Raises:
            ModelLoadError: If the file changed since it was opened.
        """
        block: Tensor = self._unchanged(name).get_slice(name)[rows, cols]
        return block

    def _unchanged(self, name: str) -> Any:
        """The open file of a tensor, if it is still what was opened."""
        number = self._where[name]
        path = self._files[number]
        try:
            unchanged = _stamp(path) == self._stamps[number]
        except OSError as error:
            raise ModelLoadError(f"{path} is gone; reload the model") from error
        if not unchanged:
            raise ModelLoadError(f"{path} changed on disk since the model was loaded; reload the model")
        return self._handles[number]


class SpillSource:
    """A temporary file, mapped into memory: for models that have no checkpoint.

    The file lies in the folder for temporary files (`TMPDIR`) and has no name: it goes with this object, and
    with the process however that ends.

    Args:
        tensors: What to keep.

    Raises:
        ModelLoadError: If the temporary folder is full or not writable.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._spans: dict[str, tuple[int, int]] = {}  # name -> where its bytes begin, and how many
        try:
            with tempfile.TemporaryFile(prefix="pahq_hf-") as file:
                for name, tensor in tensors.items():
                    file.write(bytes(-file.tell() % _ALIGNED))
                    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                    self._spans[name] = file.tell(), file.write(raw.data)
                file.write(bytes(_ALIGNED))  # an empty file cannot be mapped
                file.flush()
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelLoadError(
                f"cannot keep the FP32 weights in the temporary folder: {error}; set TMPDIR to one with room"
            ) from error
        self._tensors = {
            name: torch.frombuffer(
                self._mapped, dtype=tensor.dtype, count=tensor.numel(), offset=self._spans[name][0]
            ).view(tensor.shape)
            for name, tensor in tensors.items()
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> SpillSource:
        """Itself: nothing in it changes, and a mapped file cannot be copied."""
        return self

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read(self, name: str, rows: slice, cols: slice) -> Tensor:
        """A private copy of a block."""
        return self.view(name, rows, cols).clone()

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor ahead; returns at once."""
        if hasattr(mmap, "MADV_WILLNEED"):
            start, length = self._spans[name]
            page = start - start % mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_WILLNEED, page, start + length - page)

    def view(self, name: str, rows: slice, cols: slice) -> Tensor:
        """A block as it lies in the mapped file; for reading only."""
        return self._tensors[name][rows, cols]


@dataclass(frozen=True)
class SourceBlock:
    """Where the rows of one projection [out, in] lie in a source tensor.

    Attributes:
        source: The reader.
        name: Tensor name.
        transposed: Whether the tensor is stored [in, out] (GPT-2's Conv1D).
        segments: Ranges of the tensor's output axis whose concatenation is the projection.
    """

    source: WeightSource
    name: str
    transposed: bool
    segments: tuple[tuple[int, int], ...]

    def read(self, rows: slice, cols: slice) -> Tensor:
        """Rows and columns of the projection in the dtype of the checkpoint. [rows, cols]"""
        return self.view(rows, cols).clone()

    def view(self, rows: slice, cols: slice) -> Tensor:
        """The same without a copy where it can be had; for reading only. [rows, cols]"""
        parts = list(self.views(rows, cols))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def prefetch(self) -> None:
        """Let the tensor come into memory in the background."""
        self.source.prefetch(self.name)

    def views(self, rows: slice, cols: slice) -> Iterator[Tensor]:
        """The same in the pieces that lie together in the file, from the first row on."""
        offset = 0
        for start, stop in self.segments:
            low = max(rows.start, offset)
            high = min(rows.stop, offset + stop - start)
            if low < high:
                span = slice(start + low - offset, start + high - offset)
                first, second = (cols, span) if self.transposed else (span, cols)
                block = self.source.view(self.name, first, second)
                yield block.t() if self.transposed else block
            offset += stop - start


def stored_name(name: str, prefix: str, source: WeightSource) -> str | None:
    """The name a checkpoint uses for a parameter: some leave out the base model's prefix.

    Args:
        name: Parameter name.
        prefix: The model's `base_model_prefix`.
        source: The checkpoint.

    Returns:
        The tensor's name, or None if there is no such tensor.
    """
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in source:
            return candidate
    return None


def byte_spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where the tensors of a safetensors file lie in it: first byte and length, by name."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return {
        name: (8 + size + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _stamp(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    # The inode tells a file renamed into its place, even within one tick of the file system's clock.
    return status.st_ino, status.st_size, status.st_mtime_ns
