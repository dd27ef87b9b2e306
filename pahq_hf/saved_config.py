"""Names that stand for a saved configuration, and so for the base model in it: what an adapter is to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pahq_hf.config import CONFIG_NAME, PAHQConfig
from pahq_hf.errors import HubError

_PLACE = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")


def find_saved_config(name: str, arguments: dict[str, Any]) -> PAHQConfig | None:
    """The configuration that a name stands for, if it is one and not a model itself.

    Args:
        name: Folder or Hub id.
        arguments: As for `PAHQModel.from_pretrained`.

    Returns:
        It, or None.

    Raises:
        ConfigError: If it is damaged.
    """
    folder = Path(name)
    if folder.is_dir():
        alone = (folder / CONFIG_NAME).is_file() and not (folder / "config.json").exists()
        return PAHQConfig.from_pretrained(folder) if alone else None
    try:
        return PAHQConfig.from_pretrained(name, **{key: arguments[key] for key in _PLACE if key in arguments})
    except HubError:
        return None
