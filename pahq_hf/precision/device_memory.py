"""Memory that runs out: what says so, going on with less, and what is said at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from pahq_hf.errors import OutOfMemoryError, first_line

T = TypeVar("T")

# What says that memory ran out, besides PyTorch's class for it: the CPU's allocator, CUDA, and libraries
# that allocate for themselves.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)
_LONGEST = 160  # characters of what PyTorch said


def free_memory(device: torch.device) -> int:
    """Bytes free on a device, or in the machine for the CPU."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + max(0, cached)  # PyTorch hands out its cache first
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        if not hasattr(os, "sysconf"):
            return 1 << 30  # Windows does not say in this way
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
    return 1 << 30


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def as_many_as_fit(
    let_go: Callable[[], None],
    most: Callable[[], int],
    halve: Callable[[int], bool],
    attempt: Callable[[int], T],
) -> T:
    """What comes of the first of some things, as many as memory allows.

    Args:
        let_go: Forgets what can be made again.
        most: How many may be tried now.
        halve: Allows fewer than so many from now on. False where that was the least.
        attempt: Computes the first so many.
    """
    while True:
        size = most()
        try:
            return attempt(size)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error) or not halve(size):
                raise
        let_go()  # only here the failed attempt has let go of what it had made


def until_it_fits(work: Callable[[], T], give_way: Callable[[], bool], what: str, device: torch.device) -> T:
    """What some work gives; when memory runs out, again with less.

    Args:
        work: May be called again after it failed.
        give_way: Frees something, or sees that less is wanted from now on; False if nothing is left to free.
        what: What does not fit, if so.
        device: Whose memory it takes.

    Raises:
        OutOfMemoryError: If it does not fit when nothing is left to free.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error):
                raise
            said = first_line(error, _LONGEST)
        if not give_way():  # only here the failed attempt has let go of what it had made
            raise ran_out(what, device, said)


def ran_out(what: str, device: torch.device, said: str) -> OutOfMemoryError:
    """The error that says what did not fit where, and what to do.

    Args:
        what: What did not fit, as in "no room for ...".
        device: Where.
        said: By whom memory was refused.
    """
    other = "a larger machine" if device.type == "cpu" else "a larger GPU, or one that nobody else uses"
    place = "this machine" if device.type == "cpu" else str(device)
    return OutOfMemoryError(
        f"{place} has no room for {what} ({said}): take fewer or shorter prompts (--n), weights in a "
        f"smaller format (--precision pahq), or {other}"
    )


@contextmanager
def memory_for(what: str, device: torch.device) -> Iterator[None]:
    """Inside, memory that runs out is an error of ours.

    Args:
        what: What is done inside.
        device: Whose memory it takes.

    Raises:
        OutOfMemoryError: If it runs out.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise ran_out(what, device, first_line(error, _LONGEST)) from error
