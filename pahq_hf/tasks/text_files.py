"""Text of a file as people have it: compressed, with a mark in front, or not in UTF-8."""

from __future__ import annotations

import codecs
import gzip
import logging
import zlib
from pathlib import Path

from pahq_hf.errors import TaskError, first_line

logger = logging.getLogger(__name__)

_GZIP = b"\x1f\x8b"
_LARGEST = 1 << 30  # bytes of a file that is worth reading, unpacked
_SAMPLE = 1 << 16  # bytes that an encoding is guessed by
# charset-normalizer knows about a hundred, and short texts fit many: these are what people's programs write.
_COMMON = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254"),
    *("cp932", "euc_jp", "gb18030", "big5", "euc_kr", "utf_16"),
)
_USUAL = "cp1252"  # where it fits as well as the best


def read_text(path: Path) -> str:
    """The text of a file.

    Args:
        path: The file; one that gzip has packed is unpacked, whatever its name.

    Returns:
        Its text. A mark of UTF-8 or UTF-16 in front tells the encoding; else it is UTF-8, or guessed, which a
        warning says.

    Raises:
        TaskError: If it cannot be read, is too large, or is no text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if data.startswith(_GZIP):
            with gzip.open(path) as file:
                data = file.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{path}: cannot be read: {first_line(error)}") from error
    if len(data) > _LARGEST:
        raise TaskError(f"{path}: larger than {_LARGEST >> 30} GiB; split it into smaller files")
    return _decoded(data, path)


def _decoded(data: bytes, path: Path) -> str:
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = None if marked else _guessed(data)
        if encoding is None:
            raise TaskError(f"{path}: cannot be read as text, neither as UTF-8 nor otherwise") from error
    logger.warning(
        "%s: it is not in UTF-8 and is read as %s, which is a guess: save it in UTF-8 if that is wrong",
        path,
        encoding,
    )
    return data.decode(encoding)


def _guessed(data: bytes) -> str | None:
    """The likeliest encoding that can decode all of a text; None if there is none."""
    from charset_normalizer import from_bytes

    if b"\x00" in data:
        return None
    found = list(from_bytes(data[:_SAMPLE], cp_isolation=list(_COMMON)))
    if not found:
        return None
    usual = any(match.chaos <= found[0].chaos and _USUAL in match.could_be_from_charset for match in found)
    for encoding in [*([_USUAL] if usual else []), *(match.encoding for match in found)]:
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding
    return None
