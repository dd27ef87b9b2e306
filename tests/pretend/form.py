"""Make the device exist, or take a real one. Imported before torch."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Literal

Form = Literal["pure", "cuda", "card"]
COMPILER = "g++"


def prepare(form: Form) -> str:
    """Prepare the process for a form; returns the type of its device."""
    if form == "card":
        return "cuda"
    if form == "cuda":
        assert "torch" not in sys.modules, "torch asks for a GPU's hooks when it is imported"
        library = built()
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        return "cuda"
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend("pretend")
    return "pretend"


def built() -> Path:
    """The compiled guard for this torch, built once and kept in a cache."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch = Path(found.origin).parent
    cache = Path(os.environ.get("PAHQ_CACHE", "~/.cache/pahq_hf")).expanduser() / "pretend"
    library = cache / f"guard-{importlib.metadata.version('torch')}-{sys.implementation.cache_tag}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    folders = (torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include"))
    with tempfile.TemporaryDirectory(dir=cache) as unfinished:
        made = Path(unfinished) / library.name
        subprocess.run(
            [
                COMPILER,
                *("-shared", "-fPIC", "-O0", "-std=c++20"),
                str(Path(__file__).parent / "guard.cpp"),
                *("-o", str(made)),
                *(f"-I{folder}" for folder in folders),
                *(f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"),
            ],
            check=True,
        )
        os.replace(made, library)
    return library


def can_compile() -> bool:
    """Whether the form `cuda` can be had."""
    return shutil.which(COMPILER) is not None
