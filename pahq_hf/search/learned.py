"""What learning has come to, kept in a run's folder so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pahq_hf.circuit.files import LEARNED_NAME, write_atomically
from pahq_hf.errors import RunError
from pahq_hf.search.journal import check_header
from pahq_hf.search.learning import Learned
from pahq_hf.search.work import Work

_ARRAYS = ("scores", "mean", "square")


def kept_scores(work: Work[Any], learned: Learned) -> None:
    """Keep the state after a level, and its step in the journal.

    Raises:
        RunError: If it cannot be written.
    """
    folder = work.folder
    if folder is not None:
        notes = {
            "run": json.dumps(
                {"header": dict(work.header), "level": learned.level, "learned": _check(learned)}
            )
        }
        arrays = {name: np.ascontiguousarray(getattr(learned, name)) for name in _ARRAYS}

        def write(path: Path) -> None:
            try:
                save_file(arrays, path, metadata=notes)
            except SafetensorError as error:  # its way of passing on an OSError
                raise OSError(str(error)) from error

        write_atomically(folder / LEARNED_NAME, write)
    work.keep({"level": learned.level, "learned": _check(learned)})


def load_scores(work: Work[Any], last: int) -> Learned | None:
    """The state that an interrupted run kept; None if it kept none.

    Args:
        work: The search.
        last: The last level there is.

    Raises:
        RunError: If it is missing, damaged, or of another run.
    """
    levels = [step for step in work.steps if "level" in step]
    folder = work.folder
    if folder is None or not work.is_begun or not levels:
        return None
    path = folder / LEARNED_NAME
    try:
        with safe_open(path, framework="numpy") as file:
            notes = json.loads((file.metadata() or {})["run"])
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        level, header = notes["level"], dict(notes["header"])
        if type(level) is not int or not header:
            raise ValueError("it does not say what it is")
        learned = Learned(level, **arrays)
        if any(array.shape != work.graph.all_edges.shape for array in arrays.values()):
            raise ValueError("its scores are not those of the graph")
        if notes["learned"] != _check(learned):
            raise ValueError("its scores do not have their checksum")
        said = {step["level"]: step["learned"] for step in levels}
        if learned.level in said and said[learned.level] != _check(learned):
            raise ValueError("its scores do not have their checksum")
        if (
            level > last
            or level not in (len(levels), len(levels) + 1)
            or list(said) != [*range(1, len(levels) + 1)]
        ):
            raise ValueError("it is not at the level of the journal")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise RunError(
            f"cannot continue the run in {folder}: {LEARNED_NAME}, what it has learned, is missing or "
            f"damaged ({error}); choose another folder"
        ) from error
    check_header(header, work.header, folder)
    if learned.level > len(levels):  # it stopped between the two
        work.keep({"level": learned.level, "learned": _check(learned)})
    return learned


def _check(learned: Learned) -> str:
    digest = hashlib.blake2b(str(learned.level).encode(), digest_size=8)
    for name in _ARRAYS:
        digest.update(np.ascontiguousarray(getattr(learned, name)).tobytes())
    return digest.hexdigest()
