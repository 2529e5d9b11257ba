"""What is free, as Linux and control groups say it, from files made by the test."""

from pathlib import Path

import pytest
import torch

from twotower.planning.machine import device_memory, host_memory, in_words

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nHugePages_Free:  0\n"


def root(folder: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def group(version: int, path: str, limit: str, used: int, inactive: int) -> dict[str, str]:
    """The files of one control group."""
    if version == 2:
        at, names, word = f"sys/fs/cgroup/{path}", ("memory.max", "memory.current"), "inactive_file"
    else:
        at, word = f"sys/fs/cgroup/memory/{path}", "total_inactive_file"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    texts = (*zip(names, (limit, str(used)), strict=True), ("memory.stat", f"anon 5\n{word} {inactive}\nfile 9\n"))
    return {f"{at}/{name}": text for name, text in texts}


def test_without_limits_it_is_what_linux_calls_available(tmp_path: Path) -> None:
    found = host_memory(root(tmp_path, {"proc/self/cgroup": "0::/\n"}))
    assert (found.total, found.free) == (16 * GIB, 8 * GIB)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seen", [True, False])
def test_a_control_group_bounds_it_less_what_it_uses(version: int, seen: bool, tmp_path: Path) -> None:
    """In a container the process's path is often the host's, and what is mounted is the group itself."""
    line = "0::/pods/one\n" if version == 2 else "12:cpu,cpuacct:/\n4:memory:/pods/one\n"
    files = group(version, "pods/one" if seen else "", str(4 * GIB), 3 * GIB, GIB)
    found = host_memory(root(tmp_path, {"proc/self/cgroup": line} | files))
    assert (found.total, found.free) == (4 * GIB, 2 * GIB)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = group(2, "pods/one", "max", 3 * GIB, 0) | group(2, "pods", str(6 * GIB), 5 * GIB, 0)
    found = host_memory(root(tmp_path, {"proc/self/cgroup": "0::/pods/one\n"} | files))
    assert (found.total, found.free) == (6 * GIB, GIB)
    more = group(2, "pods/one", str(2 * GIB), 3 * GIB, 0)  # over its limit
    assert host_memory(root(tmp_path, more)).free == 0


def test_this_machine_has_memory() -> None:
    host = host_memory()
    assert 0 < host.free <= host.total
    cpu = device_memory(torch.device("cpu"))
    assert (cpu.name, cpu.kind, cpu.total) == ("cpu", "cpu", host.total)


def test_bytes_in_words() -> None:
    assert [in_words(n) for n in (0, 1023, 1024, 3 << 19, 5 * GIB)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "5.0 GiB",
    ]
