"""The inside of `sandbox`: shuts this process in, then runs the program that stdin holds. Imports nothing of ours.

Linux namespaces keep the network, other processes and the writing of files away, where the kernel grants them to this
user; resource limits hold on every POSIX system.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

_NEW_MOUNTS, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x00020000, 0x10000000, 0x20000000, 0x40000000
_MOUNT_SETATTR, _WHOLE_TREE, _READ_ONLY, _PRIVATE = 442, 0x8000, 1, 1 << 18
_CAPABILITIES_V3 = 0x20080522
_DIE_WITH_PARENT = 1  # of prctl


def shut_in() -> dict[str, bool]:
    """Leaves the network, the other processes (for children) and the right to write files; says what succeeded."""
    walls = {"no_network": False, "no_other_processes": False, "no_writing": False}
    if sys.platform != "linux":
        return walls
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_NETWORK) == 0:
        walls["no_network"] = walls["no_other_processes"] = True
        attributes = struct.pack("4Q", _READ_ONLY, 0, _PRIVATE, 0)
        read_only = libc.syscall(_MOUNT_SETATTR, -100, b"/", _WHOLE_TREE, attributes, len(attributes)) == 0
        # This namespace's own rights go too, with which the program could make it writable again
        no_rights = libc.capset(struct.pack("Ii", _CAPABILITIES_V3, 0), bytes(24)) == 0
        walls["no_writing"] = read_only and no_rights
    return walls


def limit(cpu_seconds: int, memory_bytes: int, wall_seconds: int) -> None:
    """Hard limits: nothing that runs later can raise them, unless it runs as root outside of a user namespace."""
    signal.alarm(wall_seconds)  # where there are no namespaces; the first process of one never gets it
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    job = json.load(sys.stdin)
    walls = shut_in()
    child = os.fork()  # the first process of the new namespace: when it ends, so does whatever it started
    if child:
        _, status = os.waitpid(child, 0)
        sys.exit(status != 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    limit(job["cpu_seconds"], job["memory_bytes"], job["wall_seconds"])
    if job["program"] is None:
        os.write(report, json.dumps(walls).encode())
    else:
        exec(compile(job["program"], "<answer>", "exec"), {"__name__": "__main__"})
        os.write(report, job["sign"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
