"""`pahq_config.json`: which base model, patched how. What an adapter's config is to PEFT."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pahq_hf import hub
from pahq_hf.circuit import make_folder, read_json
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import CircuitError, ConfigError, HubError
from pahq_hf.files import write_text

WRAPPER_NAME = "pahq_config.json"
_VERSION = 1


@dataclass(frozen=True)
class Wrapper:
    """A patched model without its weights.

    Attributes:
        config: How it is patched.
        base_model: Hub id or folder of the model; None for a configuration alone.
        revision: Its revision on the Hub.
    """

    config: PAHQConfig
    base_model: str | None = None
    revision: str | None = None

    def save(self, folder: str | Path) -> None:
        """Write `pahq_config.json` into a folder.

        Raises:
            RunError: If it cannot be written.
        """
        document = {
            "format_version": _VERSION,
            "base_model": self.base_model,
            "revision": self.revision,
            "precision": self.config.to_dict(),
        }
        write_text(make_folder(folder) / WRAPPER_NAME, json.dumps(document, indent=2) + "\n")

    def push(self, repo_id: str, **options: Any) -> str:
        """Publish it on the Hub; options as for `Circuit.push_to_hub`. Returns where the commit is.

        Raises:
            HubError: If the Hub refuses.
        """
        options.setdefault("commit_message", "Configuration of a patched model (pahq_hf)")
        return hub.push(self.save, repo_id, **options)

    @classmethod
    def read(cls, folder: Path) -> Wrapper:
        """Read `pahq_config.json` from a folder.

        Raises:
            ConfigError: If it is missing, damaged, or of a newer format.
        """
        try:
            document = read_json(folder / WRAPPER_NAME)
        except CircuitError as error:
            raise ConfigError(str(error)) from error
        version, precision = document.get("format_version"), document.get("precision")
        if not isinstance(version, int) or version > _VERSION or not isinstance(precision, dict):
            raise ConfigError(
                f"{folder / WRAPPER_NAME} has format {version!r}; this version reads up to {_VERSION}"
            )
        base, revision = document.get("base_model"), document.get("revision")
        return cls(
            PAHQConfig.from_dict(precision),
            str(base) if base is not None else None,
            str(revision) if revision is not None else None,
        )

    @classmethod
    def load(cls, name: str | Path, **options: Any) -> Wrapper:
        """Read it from a folder or from the Hub.

        Args:
            name: Folder or Hub id.
            **options: `revision`, `subfolder`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            ConfigError: If it is damaged.
            HubError: If there is none.
        """
        if Path(name).is_dir():
            return cls.read(Path(name) / (options.get("subfolder") or ""))
        return cls.read(hub.pull(hub.HubPlace(str(name), **options), (WRAPPER_NAME,)))


def find_wrapper(name: str, arguments: dict[str, Any]) -> Wrapper | None:
    """The wrapper that a name stands for, if it is one and not a model itself.

    Args:
        name: Folder or Hub id.
        arguments: As for `from_pretrained`.
    """
    folder = Path(name)
    if folder.is_dir():
        alone = (folder / WRAPPER_NAME).is_file() and not (folder / "config.json").exists()
        return Wrapper.read(folder) if alone else None
    known = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")
    try:
        return Wrapper.load(name, **{key: arguments[key] for key in known if key in arguments})
    except HubError:
        return None
