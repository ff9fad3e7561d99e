"""The CPU cores that this process may use, and their name, by which processes find out that they share them.

Two limits count: the cores that the scheduler may put the process on (`taskset`, Slurm, cpusets), and the CPU time that
its control group may use (a container's `cpus`), of which both versions that Linux has are read. Elsewhere all cores of
the machine count.
"""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def name() -> str:
    """A digest of the machine and of the cores of it that this process may run on: equal where they are the same.

    Containers on one machine have host names of their own, but the kernel's boot id is the same in all.
    """
    try:
        machine = _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine = socket.gethostname()
    return hashlib.blake2b(f"{machine} {_allowed()}".encode(), digest_size=12).hexdigest()


def share(processes: int = 1) -> int:
    """How many cores each of `processes` may use that all run on the cores of this one; 1 or more."""
    equal = len(_allowed()) // processes
    limit = time_limit()
    return max(1, equal if limit is None else min(equal, int(limit)))


def time_limit(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> float | None:
    """The CPU seconds a second that the control group of this process may use; None where there is no limit."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += [_of_version_2(folder) for folder in _upwards(cgroups, path)]
        elif "cpu" in controllers.split(","):
            limits += [_of_version_1(folder) for folder in _upwards(cgroups / controllers, path)]
            limits += [_of_version_1(folder) for folder in _upwards(cgroups / "cpu", path)]
    return min((limit for limit in limits if limit is not None), default=None)


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _upwards(root: Path, path: str) -> list[Path]:
    """The group's folder and those of the groups around it, whose limits hold too. In a container the path may be the
    host's; then only the root is there, which is the container's own group."""
    folder = root / path.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _of_version_2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _of_version_1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _ratio(quota_us: str, period_us: str) -> float | None:
    """None where there is no quota: "max", or −1."""
    if not (quota_us.isdigit() and period_us.isdigit() and int(period_us)):
        return None
    return int(quota_us) / int(period_us)
