"""The subprocess of `sandbox`: confines itself, runs the program that it reads from stdin in a process of its own, and
kills whatever that leaves. Exits with 0 if the program ran to its end. Imports nothing of this package.

Linux namespaces take away the network, the other processes and the right to write files, if the kernel grants them to
this user. Resource limits hold on every POSIX system.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

_NEW_MOUNTS, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x00020000, 0x10000000, 0x20000000, 0x40000000
_MOUNT_SETATTR, _WHOLE_TREE, _READ_ONLY, _PRIVATE = 442, 0x8000, 1, 1 << 18
_CAPABILITIES_V3 = 0x20080522
_SIGNAL_AT_PARENTS_END, _ADOPT_ORPHANS = 1, 36  # of prctl
_SIGN_BYTES = 16
_ON_LINUX = sys.platform == "linux"


def shut_in() -> dict[str, bool]:
    """Gives up the network, the sight of other processes (for children) and writing files; says what succeeded."""
    walls = {"no_network": False, "no_other_processes": False, "no_writing": False}
    if not _ON_LINUX:
        return walls
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_NETWORK) == 0:
        walls["no_network"] = walls["no_other_processes"] = True
        attributes = struct.pack("4Q", _READ_ONLY, 0, _PRIVATE, 0)
        read_only = libc.syscall(_MOUNT_SETATTR, -100, b"/", _WHOLE_TREE, attributes, len(attributes)) == 0
        # Capabilities in the new namespace are dropped too: with them the program could make files writable again
        no_rights = libc.capset(struct.pack("Ii", _CAPABILITIES_V3, 0), bytes(24)) == 0
        walls["no_writing"] = read_only and no_rights
    return walls


class Process(NamedTuple):
    """A process as /proc shows it: its id, its parent's, its user's, and its number of threads."""

    pid: int
    parent: int
    owner: int
    threads: int


def processes() -> Iterator[Process]:
    """All processes that Linux shows to this user."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{name}/stat", "rb") as file,
            ):  # the process may just have ended
                fields = file.read().rpartition(b")")[2].split()  # the name before it may hold any character
                yield Process(int(name), int(fields[1]), os.fstat(file.fileno()).st_uid, int(fields[17]))


def limit(cpu_seconds: int, memory_bytes: int, most_threads: int) -> None:
    """Sets hard limits, which only root outside of a user namespace could raise again."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    if _ON_LINUX:
        limits[resource.RLIMIT_NPROC] = most_threads
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (lower, lower))


def passes(program: str, cpu_seconds: int, memory_bytes: int, most_threads: int, wall_seconds: int) -> bool:
    """Whether the program, in a process of its own, runs to its end; kills whatever it started.

    To tell its end from leaving early, the process hands back a random sign after the program. It reads the sign from a
    pipe only then, so that the program does not find it among its variables.
    """
    signs, sign_in = os.pipe()
    reports, report = os.pipe()
    runner = os.fork()  # the first process of a new namespace: with its end the kernel kills all that it started
    if runner == 0:
        os.close(sign_in)
        os.close(reports)
        run(program, signs, report, (cpu_seconds, memory_bytes, most_threads))
    os.close(report)
    sign = os.urandom(_SIGN_BYTES)
    os.write(sign_in, sign)
    end(runner, wall_seconds)
    return os.read(reports, len(sign) + 1) == sign


def run(program: str, signs: int, report: int, limits: tuple[int, int, int]) -> NoReturn:
    """Runs the program in this process under `limit`, and after its end copies the sign from `signs` to `report`."""
    os.setpgid(0, 0)
    if _ON_LINUX:
        ctypes.CDLL(None).prctl(_SIGNAL_AT_PARENTS_END, signal.SIGKILL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for used in range(3):
        os.dup2(nowhere, used)
    limit(*limits)
    exec(compile(program, "<answer>", "exec"), {"__name__": "__main__"})
    os.write(report, os.read(signs, _SIGN_BYTES))
    os._exit(0)


def end(runner: int, wall_seconds: int) -> None:
    """Waits for the process to end, at most `wall_seconds` or until SIGTERM; then kills it and whatever it started."""

    def stop(*_: object) -> None:
        ignore()
        raise TimeoutError

    def ignore() -> None:
        for number in (signal.SIGALRM, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, stop)
    signal.alarm(wall_seconds)
    try:
        os.waitpid(runner, 0)
        ignore()
    except TimeoutError:
        os.kill(runner, signal.SIGKILL)
    with contextlib.suppress(OSError):  # the whole group at once, if any is left, which forking can't outrun
        os.killpg(runner, signal.SIGKILL)
    while True:  # processes that left the group become children of this one as their parents end
        for process in processes() if _ON_LINUX else ():
            if process.parent == os.getpid():
                os.kill(process.pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main() -> None:
    job = json.load(sys.stdin)
    running = sum(p.threads for p in processes() if p.owner == os.getuid()) if _ON_LINUX else 0
    walls = shut_in()
    if job["program"] is None:
        sys.stdout.write(json.dumps(walls))
        return
    if _ON_LINUX:  # after shut_in, because a new namespace resets it
        libc = ctypes.CDLL(None)
        libc.prctl(_ADOPT_ORPHANS, 1)
        libc.prctl(_SIGNAL_AT_PARENTS_END, signal.SIGTERM)
    # The kernel counts all processes of the user; in a user namespace, since Linux 5.14, only those in it
    most_threads = running + job["processes"]
    passed = passes(job["program"], job["cpu_seconds"], job["memory_bytes"], most_threads, job["wall_seconds"])
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
