"""What a model's folder and config have to be like before a library reads them or takes memory for them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from pahq_hf.circuit.json_reader import LARGEST_FLOAT, parse_json, read_regular
from pahq_hf.errors import ModelLoadError, describe

_CONFIG_BYTES = 1 << 26  # those of models with a hundred thousand labels have a few million
_CONFIG_FILES = ("config.json", "generation_config.json")  # a model needs no tokenizer
_READ = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja", ".py")  # by some library
# The most of each that a config may ask for, ten times and more what the largest models have.
_MOST = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4,
    "head_dim": 10**5,
    "max_position_embeddings": 10**9,
}
_MOST_LABELS = 10**6  # of which transformers makes a table before anybody asks for one
_REQUIRED = {"hidden_size", "num_hidden_layers", "num_attention_heads"}


def check_folder(name: str) -> None:
    """Check what can be told of a model's folder without a library.

    A path to nothing is refused; a name that could be on the Hub is asked for there.

    Raises:
        ModelLoadError: If it can only be a path, and nothing is there; or a file in it is none, or a config
            cannot be read.
    """
    path = str(name)
    is_path = path.startswith((".", "~")) or os.path.isabs(path) or path.count("/") > 1
    if is_path and not os.path.exists(path):
        raise ModelLoadError(f"cannot read the model {_short(name)}: there is no such folder")
    if not os.path.isdir(path):
        return
    try:
        for entry in os.scandir(path):
            _check_entry(entry)
        for config in _CONFIG_FILES:
            if os.path.lexists(os.path.join(path, config)):
                _check_config(Path(path) / config)
    except OSError as error:
        raise ModelLoadError(f"cannot read the model {_short(name)}: {error.strerror}") from error


def _check_entry(entry: os.DirEntry[str]) -> None:
    """Refuse a pipe or device that a library would wait for, or read without an end."""
    if not entry.name.endswith(_READ):
        return
    try:
        mode = entry.stat().st_mode
    except FileNotFoundError:
        return  # a link to nothing; who needs it says so
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ModelLoadError(f"cannot read {entry.path}: it is no file, but a device, a pipe or a socket")


def _check_config(path: Path) -> None:
    try:
        document = parse_json(
            read_regular(path, _CONFIG_BYTES), LARGEST_FLOAT
        )  # some mean infinity by 10**30
    except FileNotFoundError:
        return
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelLoadError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise ModelLoadError(f"{path} is damaged: it does not hold a JSON object")
    labels = document.get("num_labels")
    if isinstance(labels, (int, float)) and not labels <= _MOST_LABELS:
        raise ModelLoadError(f"{path} is damaged: num_labels is {labels}, more than {_MOST_LABELS:,}")


def check_sizes(config: PretrainedConfig, name: str, *, known: bool = True) -> None:
    """Check a config's numbers, which transformers takes as they are, before anything is made by them.

    Args:
        config: The config.
        name: The model's name, for the message.
        known: Whether its family is known to have all of them.

    Raises:
        ModelLoadError: Naming one that cannot be.
    """
    for field, most in _MOST.items():
        value: Any = getattr(config, field, None)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole and (field not in _REQUIRED or not known):
            continue  # some families have none, or one for each layer
        if not is_whole or not 1 <= value <= most:
            field = getattr(config, "attribute_map", {}).get(field, field)
            raise ModelLoadError(
                f"the config of {_short(name)} is damaged: {field} must be a whole number from 1 to "
                f"{most:,}; got {describe(value)}"
            )


def _short(name: object) -> str:
    """A name as it was given, of which a long one is cut."""
    text = repr(name)
    return text if len(text) <= 200 else text[:200] + "..."
