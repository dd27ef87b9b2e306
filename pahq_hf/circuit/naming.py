"""What a model is called in what people share: its id on the Hub, or its folder's name without the path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pahq_hf.errors import ConfigError

_CACHED = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_DEEP = re.compile(r"[^/<>\"|?*]+(/[^/<>\"|?*]+){2,}/?")  # deeper than an id on the Hub
_NO_HUB = ("demo", "unknown")


def shared_name(name: str) -> dict[str, Any]:
    """What is stored of the name by which a model was loaded.

    Args:
        name: Hub id, folder, file, or `demo`.

    Returns:
        `base_model`, and whether it is `local`: then it is the last part of a folder's path. A folder of the
        Hub's cache is the model it holds, at its `revision`.
    """
    cached = _CACHED.search(name)
    if cached is not None:
        return {
            "base_model": cached["id"].replace("--", "/"),
            "local": False,
            "revision": cached["revision"],
        }
    if name in _NO_HUB or not is_place(name):
        return {"base_model": name, "local": False}
    path = PureWindowsPath(name) if _WINDOWS.match(name) else Path(os.path.abspath(os.path.expanduser(name)))
    return {"base_model": path.name or "unknown", "local": True}


def is_place(name: str) -> bool:
    """Whether a name is of something on a machine, there or not."""
    looks = name.startswith(("/", "./", "../", "~")) or _WINDOWS.match(name) or _DEEP.fullmatch(name)
    return bool(looks) or ("\0" not in name and os.path.exists(name))


def without_place(model: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a circuit's model, without the path that earlier versions kept of a folder."""
    name = model.get("base_model")
    if not isinstance(name, str) or isinstance(model.get("local"), bool):
        return dict(model)
    return {**model, **shared_name(name)}


def with_base_model(identity: Mapping[str, Any], hub_id: str) -> dict[str, Any]:
    """The identity of a model of which somebody says what it is on the Hub.

    Raises:
        ConfigError: If that can be no model's id.
    """
    if not _can_be_id(hub_id):
        raise ConfigError(
            f"base_model must be a model's id on the Hub, such as owner/name; got {hub_id!r} (--base-model)"
        )
    same = identity.get("base_model") == hub_id and not identity.get("local")
    revision = identity.get("revision") if same else None
    return {**identity, "base_model": hub_id, "local": False, "revision": revision}


def hub_id_of(model: Mapping[str, Any]) -> str | None:
    """The id on the Hub of a circuit's model; None where it has none that is known."""
    found = without_place(model)
    name = str(found.get("base_model", "unknown"))
    return name if not found.get("local") and _can_be_id(name) else None


def _can_be_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name not in _NO_HUB
