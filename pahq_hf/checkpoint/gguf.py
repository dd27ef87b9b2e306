"""The header of a GGUF file: what a model's config is made of, without its tokens and weights.

Libraries turn every token of the vocabulary into Python objects before they say how many layers there are.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b"GGUF"
_FORMATS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "B", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_LONG = 1024  # entries of an array that describes a vocabulary, not a model
_ALIGNMENT = 32


def write_header(source: Path, target: Path) -> None:
    """Write a GGUF file with the metadata of another one, but without long arrays, and with no weights.

    Its tensors are a hole in the file, which takes no room; of the vocabulary there is its size.

    Args:
        source: A GGUF file.
        target: The file to write.

    Raises:
        ValueError: If it is none, or ends within its header.
        OSError: If one cannot be read, or the other not be written.
    """
    with source.open("rb") as file:
        whole = os.fstat(file.fileno()).st_size
        if whole < 24:
            raise ValueError(f"{source.name} is no GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            try:
                header, data = _Header(raw).slim()
            except (struct.error, IndexError, UnicodeDecodeError) as error:
                raise ValueError(f"{source.name} ends within its header, or is damaged: {error}") from error
    with target.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + max(0, whole - data))


class _Header:
    """Metadata and table of tensors of a GGUF file, read from the front to the back."""

    def __init__(self, raw: mmap.mmap) -> None:
        self._raw = raw
        self._at = 4
        if raw[:4] != _MAGIC:
            raise ValueError("it does not begin as a GGUF file")
        self._version, self._tensors, self._entries = self._read("<IQQ")

    def slim(self) -> tuple[bytes, int]:
        """The header without long arrays, padded, and where the weights begin in the file."""
        kept = dict(self._metadata())
        table = self._at
        for _ in range(self._tensors):
            self._string()
            (dimensions,) = self._read("<I")
            self._at += 8 * dimensions + 12
            if self._at > len(self._raw):
                raise IndexError("the table of tensors is cut off")
        alignment = self._alignment(kept)
        count = len(kept)
        head = _MAGIC + struct.pack("<IQQ", self._version, self._tensors, count) + b"".join(kept.values())
        head += self._raw[table : self._at]
        return head + bytes(-len(head) % alignment), self._at + -self._at % alignment

    def _metadata(self) -> Iterator[tuple[str, bytes]]:
        """Entries that are kept, by key, as they are in the file."""
        keys, architecture, tokens = set(), "", 0
        for _ in range(self._entries):
            start = self._at
            key = self._string()
            keys.add(key)
            (kind,) = self._read("<I")
            if kind == _STRING and key == "general.architecture":
                architecture = self._string()
                yield key, self._raw[start : self._at]
                continue
            count = self._skip(kind)
            if count < _LONG:
                yield key, self._raw[start : self._at]
            elif key == "tokenizer.ggml.tokens":
                tokens = count
        size = f"{architecture}.vocab_size"
        if tokens and size not in keys:
            name = size.encode()
            yield size, struct.pack("<Q", len(name)) + name + struct.pack("<II", _UINT32, tokens)

    def _skip(self, kind: int) -> int:
        """Pass over a value. Returns how many entries it has."""
        if kind == _STRING:
            self._string(decode=False)
        elif kind == _ARRAY:
            inner, count = self._read("<IQ")
            if inner in _FORMATS:
                self._at += count * struct.calcsize(_FORMATS[inner])
            else:
                for _ in range(count):
                    self._skip(inner)
            return int(count)
        elif kind in _FORMATS:
            self._at += struct.calcsize(_FORMATS[kind])
        else:
            raise ValueError(f"its header has values of an unknown type {kind}")
        return 1

    def _string(self, *, decode: bool = True) -> str:
        (length,) = self._read("<Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._raw):
            raise IndexError("a text is cut off")
        return self._raw[start : self._at].decode() if decode else ""

    def _read(self, fmt: str) -> tuple[int, ...]:
        values = struct.unpack_from(fmt, self._raw, self._at)
        self._at += struct.calcsize(fmt)
        return values

    def _alignment(self, kept: dict[str, bytes]) -> int:
        entry = kept.get("general.alignment")
        return struct.unpack("<I", entry[-4:])[0] or _ALIGNMENT if entry else _ALIGNMENT
