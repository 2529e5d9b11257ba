"""How much memory a device has, and how much of it is free."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import resource
except ModuleNotFoundError:  # Windows has none
    resource = None  # type: ignore[assignment]


class DeviceMemory(NamedTuple):
    """A device's name, its bytes of memory, and those of them that are free."""

    name: str
    total: int
    free: int

    @property
    def kind(self) -> str:
        """The type of the device, such as "cpu" or "cuda"."""
        return self.name.partition(":")[0]

    def less(self, used: int) -> "DeviceMemory":
        """The device after `used` more bytes are taken; `free` may become negative."""
        return self._replace(free=self.free - used)


def device_memory(device: torch.device) -> DeviceMemory:
    """The memory of a device. What PyTorch holds without using it counts as free. Any kind of device that isn't known
    here is taken to share the host's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return DeviceMemory(str(device), total, free + cached)
    host = host_memory()
    if device.type == "mps":  # a part of the host's memory
        total = torch.mps.recommended_max_memory()
        return DeviceMemory(str(device), total, min(total - torch.mps.driver_allocated_memory(), host.free))
    return host._replace(name=str(device))


def host_memory(root: Path = Path("/")) -> DeviceMemory:
    """The memory that this process may use: what Linux calls available, below `root` as in the file system, or less if
    a control group (a container's, a service's) or `ulimit -v` allows less.

    A system that isn't Linux is taken to have half of its memory free, for it doesn't say.
    """
    rooms = [_available(root / "proc/meminfo"), *_groups(root)]
    if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        statm = root / "proc/self/statm"
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
        rooms.append((limit, limit - mapped))
    return DeviceMemory("cpu", min(total for total, _ in rooms), max(min(free for _, free in rooms), 0))


def _available(meminfo: Path) -> tuple[int, int]:
    """The machine's bytes, and those that are available."""
    if meminfo.exists():
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines()}
        return found["MemTotal"], found.get("MemAvailable", found["MemFree"])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
    return total, total // 2


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each control group that holds this process, and what is left of it. Pages of files that nobody has
    read of late don't count as used, because they are given up first."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = mount / path.lstrip("/")
        # Inside a container the path may be one of the host, of which only the mount itself is seen.
        for folder in (group, *group.parents):
            limit, used = folder / names[0], folder / names[1]
            if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int(most), int(most) - int(used.read_text()) + int(statistics.get(names[2], 0))
            if folder == mount:
                break


def in_words(count: int) -> str:
    """A number of bytes in the largest unit that it fills."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
