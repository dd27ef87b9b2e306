"""What a run's facts say of the GPU it ran on."""

from __future__ import annotations

from typing import Any

import torch

from pahq_hf.precision.flags import product_flags


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
