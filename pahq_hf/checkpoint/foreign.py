"""What libraries raise while they read somebody's files: one line that says which files."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError

from pahq_hf.errors import ModelLoadError, OutOfMemoryError, PAHQError, first_line
from pahq_hf.precision.device_memory import out_of_memory

_RUST = "pyo3_runtime"  # where panics of libraries in Rust are from, which are no `Exception`
_LONGEST = 300
_SPEAKING = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
)  # their texts are for people


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Let whatever a library raises while it reads somebody's files be an error that names them.

    Libraries foresee few of the ways in which a file can be wrong: the same config may end in a TypeError, a
    ZeroDivisionError, or a panic in Rust.

    Args:
        what: What could not be done, as in "cannot read the model 'x'".

    Raises:
        ModelLoadError: With what the library said.
        OutOfMemoryError: If memory ran out.
    """
    try:
        yield
    except PAHQError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != _RUST:
            raise  # Ctrl-C, and what ends the process
        if isinstance(error, MemoryError) or (isinstance(error, Exception) and out_of_memory(error)):
            raise OutOfMemoryError(f"{what}: memory ran out ({first_line(error)})") from error
        raise ModelLoadError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What is wrong with a file, from what a library raised about it."""
    if isinstance(error, RecursionError):
        return "something in it is nested too deeply"
    if isinstance(error, EOFError):
        return "a file is empty, or ends too early"
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in str(error):
        return "its weights are no plain tensors, and unpickling others could run code: use safetensors"
    if isinstance(error, StrictDataclassError):
        said = str(error).strip().splitlines()
        return " ".join((said[-1] if said else "a value is of another type").split())[:_LONGEST]
    said_first = first_line(error, _LONGEST)
    plain = isinstance(error, _SPEAKING) and said_first != type(error).__name__
    return said_first if plain else f"{type(error).__name__}: {said_first}"
