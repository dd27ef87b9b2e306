"""Where a checkpoint's files are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from pahq_hf.checkpoint.demo_path import demo_path
from pahq_hf.checkpoint.foreign import reading
from pahq_hf.circuit.json_reader import parse_json, read_regular
from pahq_hf.errors import ModelLoadError, describe

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")
_LONGEST_NAME = 255


def resolve(name: str) -> str:
    """A model's name, with the bundled `demo` turned into its folder."""
    return str(demo_path()) if name == "demo" else name


def pick(arguments: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Some of the keyword arguments, as far as they are given."""
    return {name: arguments[name] for name in names if name in arguments}


def safetensors_files(name: str, **kwargs: Any) -> list[Path]:
    """The checkpoint's safetensors files; empty when it has none (GGUF, pickled weights)."""
    if kwargs.get("gguf_file"):
        return []
    wanted = pick(kwargs, *HUB_ARGUMENTS)
    lenient = {"_raise_exceptions_for_missing_entries": False}
    source = resolve(name)

    def variant(file: str) -> str:
        if not kwargs.get("variant"):
            return file
        stem, _, ending = file.rpartition(".")
        return f"{stem}.{kwargs['variant']}.{ending}"

    with reading(f"cannot find the weights of {name!r}"):
        single = cached_file(source, variant(SAFE_WEIGHTS_NAME), **wanted, **lenient)
        if single is not None:
            return [Path(single)]
        index = cached_file(source, variant(SAFE_WEIGHTS_INDEX_NAME), **wanted, **lenient)
        if index is None:
            return []
        _check_index(Path(index))
        files, _ = get_checkpoint_shard_files(source, index, **wanted)
        return [Path(file) for file in files]


def _check_index(path: Path) -> None:
    """Check that an index names files beside it.

    Raises:
        ModelLoadError: If it is damaged, names none, or leads elsewhere.
    """
    try:
        document = parse_json(read_regular(path))
    except ValueError as error:
        raise ModelLoadError(f"cannot find the weights: {path} is damaged: {error}") from error
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not names:
        raise ModelLoadError(f"cannot find the weights: {path} has no 'weight_map' of files by tensor")
    if not isinstance(document.get("metadata"), dict):
        raise ModelLoadError(f"cannot find the weights: {path} has no 'metadata', not even an empty one")
    for name in names.values():
        if not isinstance(name, str) or not _is_beside(name):
            raise ModelLoadError(f"cannot find the weights: {path} names {describe(name)}, no file beside it")


def _is_beside(name: str) -> bool:
    """Whether a name can be that of a file in the same folder, or in one below it."""
    is_name = 0 < len(name) <= _LONGEST_NAME and "\0" not in name
    return is_name and not os.path.isabs(name) and ".." not in PurePath(name).parts


def local_files(name: str, **kwargs: Any) -> list[Path]:
    """The checkpoint's safetensors files as far as they are on this machine; nothing is downloaded."""
    try:
        return safetensors_files(name, **(kwargs | {"local_files_only": True}))
    except ModelLoadError:
        return []
