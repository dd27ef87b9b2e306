"""The checkpoint that ships with the package: small enough for examples, tests and a first try."""

from __future__ import annotations

from pathlib import Path


def demo_path() -> Path:
    """Folder of the demo checkpoint, for `from_pretrained`.

    A GPT-2 of 4 layers x 4 heads that `tools/train_demo.py` trained on every generated task but `docstring`,
    with its own word-level tokenizer.

    Returns:
        The folder.
    """
    return Path(__file__).parent / "demo"
