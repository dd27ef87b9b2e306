"""Arrays that a search keeps in its run's folder, beside its journal, for whoever continues it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pahq_hf.circuit.files import write_atomically
from pahq_hf.circuit.json_reader import check_regular, parse_json
from pahq_hf.errors import RunError

Arrays = Mapping[str, NDArray[Any]]
# What reading a damaged file raises, and what its reader may for what it finds in it.
DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def save_arrays(path: Path, arrays: Arrays, notes: Mapping[str, Any]) -> None:
    """Write arrays and what is to be said of them; a file of that name is replaced as a whole.

    Raises:
        RunError: If it cannot be written.
    """
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"run": json.dumps(dict(notes))}

    def write(place: Path) -> None:
        try:
            save_file(whole, place, metadata=metadata)
        except SafetensorError as error:  # its way of passing on an OSError
            raise OSError(str(error)) from error

    write_atomically(path, write)


def read_arrays(path: Path, names: Iterable[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read what `save_arrays` wrote.

    Returns:
        The arrays by name, and what is said of them.

    Raises:
        ValueError: If the file is damaged; or another of `DAMAGED`.
    """
    check_regular(path)
    with safe_open(path, framework="numpy") as file:
        notes = parse_json((file.metadata() or {})["run"])
        return {name: file.get_tensor(name) for name in names}, dict(notes)


def checksum(arrays: Iterable[NDArray[Any]], of: str = "") -> str:
    """A checksum of arrays, and of a text that belongs to them."""
    digest = hashlib.blake2b(of.encode(), digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cannot_continue(path: Path, what: str, error: Exception) -> RunError:
    """The error that a run cannot go on, of a file that is missing or damaged.

    Args:
        path: The file.
        what: What it holds.
        error: What is wrong with it.
    """
    return RunError(
        f"cannot continue the run in {path.parent}: {path.name}, {what}, is missing or damaged ({error}); "
        "choose another folder"
    )
