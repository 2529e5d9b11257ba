"""How many threads a command takes and how they wait: decided before PyTorch loads, which reads both once."""

import os
from collections.abc import MutableMapping
from pathlib import Path

# Checks of a waiting OpenMP thread before it sleeps. PyTorch's default, some milliseconds of them, costs most of the
# speed where another program needs the core; without any, small operations on a quiet machine lose a third.
SPINS = "1000"


def settle_threads(environment: MutableMapping[str, str]) -> None:
    """Sets what the user has not set: as many threads as cores that this process may use, and how long they wait."""
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = SPINS
    limit = core_limit()
    if limit is not None and limit < allowed_cores():
        environment.setdefault("OMP_NUM_THREADS", str(max(1, int(limit))))  # PyTorch looks at the machine alone


def allowed_cores() -> int:
    """Cores that the system lets this process run on, whatever their quota is."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the quotas of this process's control groups allow, of version 2 or 1; None without any.

    A container sees its own group at the root; elsewhere every group from the process's own upwards counts.
    """
    found = []
    for line in _read(own).splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            found.append(_quota(folder, version_1=bool(controllers)))
            if folder == top:
                break
    limits = [limit for limit in (*found, _quota(root, False), _quota(root / "cpu", True)) if limit is not None]
    return min(limits, default=None)


def _quota(folder: Path, version_1: bool) -> float | None:
    if version_1:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    else:
        quota, _, period = _read(folder / "cpu.max").partition(" ")
    return round(int(quota) / int(period), 2) if quota.isdecimal() and period.isdecimal() and int(quota) else None


def _read(file: Path) -> str:
    """A file of the system's, "" where this machine doesn't have it or doesn't let us read it."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
