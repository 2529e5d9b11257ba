"""Runs programs that a model wrote, in a subprocess that is confined as far as the system allows."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
LIMITS = {"cpu_seconds": 5, "memory_bytes": 1 << 30, "wall_seconds": 10, "processes": 64}
_SECONDS_TO_END = 2  # the time that the subprocess has to kill what the program started


def passes(program: str) -> bool:
    """Whether a Python program runs to its end within `LIMITS`, without an exception or `exit`.

    Processes that it started are killed when it ends. Program and tests share one interpreter, as in HumanEval's own
    harness. So a program that is written to cheat can pass, by changing what the tests compare with or by reading the
    pipe that proves its end; one that only leaves early, or writes to every file it finds open, does not.
    """
    return _run(program, subprocess.DEVNULL)[0] == 0


@functools.cache
def walls() -> dict[str, bool]:
    """Whether on this system programs have no network, see no other processes, and can't write files.

    CPU, memory and time are limited on every POSIX system, the number of processes on Linux unless the user is root.
    Without a wall, programs have the rights of the user. Without `no_other_processes` a program may kill the process
    that watches it; the processes that it started then remain. They also remain if they keep moving to new processes,
    and on systems other than Linux if they leave the program's process group.
    """
    found: dict[str, bool] = json.loads(_run(None, subprocess.PIPE)[1])
    return found


def _run(program: str | None, stdout: int) -> tuple[int, str]:
    """The child's exit status and its output; give a program no pipe as `stdout`, as it could print without end."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=folder,
            env={},
            start_new_session=True,
        ) as child,
    ):
        printed = ""
        try:
            seconds = LIMITS["wall_seconds"] + _SECONDS_TO_END
            printed = child.communicate(json.dumps({"program": program, **LIMITS}), timeout=seconds)[0]
        except subprocess.TimeoutExpired:  # the program starts processes faster than the child kills them
            child.kill()
        finally:
            child.terminate()  # after Ctrl-C, too: on SIGTERM the child kills the program before it ends
    return child.returncode, printed
