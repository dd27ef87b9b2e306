"""How many threads a run takes: as many as there are cores for them.

Threads of one run wait for each other at the end of every product. Where they share cores with other programs
the one that waits for a core holds up all, and if the others spin meanwhile they take the very cores it waits
for: a search of seconds takes a minute. So the command line counts what is free, and lets threads sleep
(`OMP_WAIT_POLICY=PASSIVE`).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pahq_hf.errors import ConfigError

_WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_WINDOW = 0.1  # seconds in which the cores' work is counted
_IDLE = 0.5  # load below which a machine counts as idle without a closer look


@dataclass(frozen=True)
class Cores:
    """Cores of this machine, as this process finds them.

    Attributes:
        usable: Cores it may use, by its affinity and its control group's quota.
        total: Cores there are.
        busy: Cores that are at work for others.
    """

    usable: int
    total: int
    busy: float

    @property
    def free(self) -> int:
        """Cores that a run can have to itself; at least one."""
        return max(1, min(self.usable, round(self.total - self.busy)))


def find_cores() -> Cores:
    """Count cores, and those that are at work now.

    The load average tells of the last minute; where it says that the machine is busy, work is counted for a
    moment too, so that what has ended does not count.

    Returns:
        The counts.
    """
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    quota = cpu_quota()
    if quota is not None:
        usable = min(usable, max(1, math.ceil(quota)))
    try:
        busy = os.getloadavg()[0]
    except (OSError, AttributeError):  # not every system has it
        busy = 0.0
    if busy > _IDLE:
        busy = min(busy, _at_work())
    return Cores(usable, total, busy)


def _at_work() -> float:
    """Cores at work on average during a moment; infinite where the system does not say."""
    before = _worked()
    time.sleep(_WINDOW)
    after = _worked()
    if before is None or after is None or after[1] == before[1]:
        return math.inf
    return (os.cpu_count() or 1) * (after[0] - before[0]) / (after[1] - before[1])


def _worked() -> tuple[int, int] | None:
    """Ticks of all cores so far: at work, and altogether."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # less idle, and idle for input and output


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that control groups grant this process; None where they set no limit.

    Args:
        root: Where control groups are mounted.
        own: Which this process belongs to.

    Returns:
        The smallest limit on the way from its group up to the root.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits: list[float] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # version 2
            limits += _limits(root, path, "cpu.max")
        elif "cpu" in controllers.split(","):
            for mount in (root / controllers, root / "cpu"):
                limits += _limits(mount, path, "cpu.cfs_quota_us")
    return min(limits, default=None)


def _limits(mount: Path, path: str, name: str) -> Iterator[float]:
    inside = Path(path.lstrip("/"))
    for group in (inside, *inside.parents):
        folder = mount / group
        try:
            quota, *period = (folder / name).read_text(encoding="ascii").split()
            period = period or [(folder / "cpu.cfs_period_us").read_text(encoding="ascii")]
            limit = int(quota) / int(period[0])
        except (OSError, ValueError):  # no such group here, or "max"
            continue
        if limit > 0:
            yield limit


def check_threads(count: int) -> None:
    """Refuse more threads than any machine of this kind gains by: the system fails to start so many.

    Args:
        count: Threads that somebody asks for.

    Raises:
        ConfigError: If there are too few or too many.
    """
    cores = os.cpu_count() or 1
    most = max(64, 4 * cores)
    if not 1 <= count <= most:
        raise ConfigError(f"threads must be at least 1 and at most {most} on {cores} cores; got {count}")


def sleep_while_waiting(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What to set so that threads without work sleep; before torch is imported, or it has no effect.

    Measured with two threads on two cores: beside eight other programs the demo's search takes 4 seconds for
    57 to 73; alone .8 for .5, and that of a 135M model 3.9 for 3.6.

    Args:
        environment: What is set already; a choice made there stays.

    Returns:
        Variables to add.
    """
    return {} if any(name in environment for name in _WAITS) else {"OMP_WAIT_POLICY": "PASSIVE"}


def take_threads(asked: int | None = None, of_run: int | None = None) -> int:
    """Choose this process's threads: as asked for, as in OMP_NUM_THREADS, as in a run, or by what is free.

    Args:
        asked: So many.
        of_run: Threads of the run that is resumed; at most as many as cores may be used.

    Returns:
        How many there are now.

    Raises:
        ConfigError: If so many are no use.
    """
    import torch

    if asked is not None:
        check_threads(asked)
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = find_cores()
        wanted = min(of_run, cores.usable) if of_run else min(torch.get_num_threads(), cores.free)
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


def thread_facts() -> dict[str, Any]:
    """What `pahq info` says about them: how many a run would take now, and why."""
    cores = find_cores()
    with restored_threads():
        count = take_threads()
    waits = next((f"{name}={os.environ[name]}" for name in _WAITS if name in os.environ), "OpenMP's default")
    facts = {"count": count, "cores": cores.total, "usable": cores.usable, "busy": round(cores.busy, 1)}
    return facts | {"waiting": waits}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads inside; None leaves them as they are."""
    if count is None:
        yield
        return
    import torch

    with restored_threads():
        torch.set_num_threads(count)
        yield


@contextmanager
def restored_threads() -> Iterator[None]:
    """Give a program that has torch loaded its own number of threads back afterwards."""
    torch = sys.modules.get("torch")
    before = None if torch is None else torch.get_num_threads()
    try:
        yield
    finally:
        if torch is not None and before is not None:
            torch.set_num_threads(before)
