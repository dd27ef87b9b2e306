"""Which device a model goes to: always one, whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pahq_hf.errors import ConfigError

_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's names


def usable_device(device: str | int | torch.device) -> torch.device:
    """A device by its name.

    Raises:
        ConfigError: If there is none of this name on this machine.
    """
    found = _found(device)
    if found.type == "meta":
        raise ConfigError("device 'meta' cannot be used: it keeps shapes and no numbers")
    return found


def _found(device: str | int | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device, dtype=torch.float64).device
    except (RuntimeError, AssertionError, ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"device {str(device)!r:.60} cannot be used: {_why_not(device)}") from error


def _why_not(device: str | int | torch.device) -> str:
    """Why a device cannot be used, in other words than those for who builds PyTorch."""
    count, found = torch.accelerator.device_count(), torch.accelerator.current_accelerator()
    here = f"cpu and {count} of {found.type}" if found is not None and count else "cpu"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        return f"there is no such device; here there is {here}"
    if found is None or wanted.type != found.type:
        return f"PyTorch {torch.__version__} finds none of type {wanted.type} here; there is {here}"
    if (wanted.index or 0) >= count:
        return f"here there is {here}"
    return f"it has no float64, in which metrics are computed; there is {here}"


def one_device(place: Any, max_memory: Mapping[Any, Any] | None = None) -> torch.device:
    """The device that a `device_map` means.

    Transformers would load a model in FP32 first to find out how `auto` divides it; it is not divided here.

    Args:
        place: A device, a map of modules to devices, or one of accelerate's names, such as `auto`: the
            machine's GPU if it has one, the CPU if it has none. None is the CPU.
        max_memory: Bytes by device, with one of accelerate's names; GPUs it leaves out or gives nothing are
            not used.

    Raises:
        ConfigError: If there is no such device, or there are several.
    """
    if place is None:
        return torch.device("cpu")
    if isinstance(place, Mapping):
        return _of_map(place)
    if isinstance(place, str) and place in _SPREADING:
        return _gpu(place, max_memory)
    return usable_device(place)


def _of_map(places: Mapping[Any, Any]) -> torch.device:
    if "disk" in places.values():
        raise ConfigError(
            "some weights are offloaded to the disk, out of reach of the projections' patches: load the "
            "model with a device_map that offloads nothing"
        )
    devices = {_found(place) for place in places.values()}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "none"
        raise ConfigError(f"the model has to be whole on one device; this device_map names {names}")
    return usable_device(devices.pop())


def _gpu(name: str, max_memory: Mapping[Any, Any] | None) -> torch.device:
    count = torch.accelerator.device_count()
    numbers = [n for n in range(count) if max_memory is None or max_memory.get(n)]
    if not numbers:
        return torch.device("cpu")
    if len(numbers) > 1:
        raise ConfigError(
            f"device_map={name!r} would spread the model over {len(numbers)} GPUs, and it has to be whole on "
            "one: name it, as in device='cuda:0'"
        )
    return usable_device(torch.device(_accelerator(), numbers[0]))


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cuda" if found is None else found.type
