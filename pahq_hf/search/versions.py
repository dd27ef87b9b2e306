"""What a run's facts say of what it ran with: libraries, and the GPU."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

import pahq_hf
from pahq_hf.precision.flags import product_flags

_LIBRARIES = ("torch", "transformers", "torchao", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of everything that could change a number."""
    found = {"pahq_hf": pahq_hf.__version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _LIBRARIES}
    return found | {"threads": str(torch.get_num_threads())}


def hardware_facts(device: torch.device) -> dict[str, Any]:
    """Card, CUDA and switches of a GPU; nothing for a CPU.

    Args:
        device: Where a model is.

    Returns:
        `hardware`: `card`, `capability`, `memory` in bytes, the `cuda` PyTorch is built for, `flags`.
    """
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "hardware": {
            "card": properties.name,
            "capability": f"{major}.{minor}",
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "flags": product_flags(),
        }
    }
