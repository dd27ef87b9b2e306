"""What takes the place of `torch.cuda` and `torch.accelerator`. Only for a process that does nothing else."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.pretend.tensor import MACHINE, PretendMode

TOTAL = 80 << 30
_SUBMIT = ThreadPoolExecutor.submit


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded = False

    def record(self, stream: Any = None) -> None:
        self._recorded = True

    def check(self) -> None:
        assert self._recorded, "waits for an event that was never recorded"


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = MACHINE.device

    def wait_event(self, event: _Event) -> None:
        event.check()

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def install(kind: str) -> PretendMode:
    """Make the device `kind:0` usable in this process; returns the mode in which it is."""
    MACHINE.device = torch.device(kind, 0)
    memory = MACHINE.memory
    torch.__future__.set_swap_module_params_on_conversion(True)  # a subclass's values cannot be set
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` and lists of indices come from the CPU
    stubs: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(name="Pretend", total_memory=TOTAL),
        "mem_get_info": lambda device=None: (max(0, room() - memory.now), room()),
        "memory_allocated": lambda device=None: memory.now,
        "memory_reserved": lambda device=None: memory.now,
        "max_memory_allocated": lambda device=None: memory.peak,
        "max_memory_reserved": lambda device=None: memory.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(memory, "peak", memory.now),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Stream(),
        "current_device": lambda: 0,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
    }
    for name, stub in stubs.items():
        setattr(torch.cuda, name, stub)
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device(kind)
    ThreadPoolExecutor.submit = _submit  # type: ignore[method-assign]
    return PretendMode()


class CountingMode(TorchDispatchMode):
    """Inside, operators of a real card are counted; they run as ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not func.is_view and any(leaf.device == MACHINE.device for leaf in made):
            MACHINE.launches[func._schema.name.split("::")[1]] += 1
        return out


def count() -> CountingMode:
    """Take the first card of this machine; returns the mode that counts."""
    MACHINE.device = torch.device("cuda", 0)
    return CountingMode()


def room() -> int:
    """Bytes the device has."""
    return TOTAL if MACHINE.memory.capacity is None else MACHINE.memory.capacity


def _submit(self: ThreadPoolExecutor, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Modes belong to a thread: another one's work enters it itself."""

    def inside() -> Any:
        with PretendMode():
            return function(*args, **kwargs)

    return _SUBMIT(self, inside)
