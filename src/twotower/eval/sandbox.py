"""Programs that a model wrote, run in a subprocess that is shut in as far as the system allows."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
LIMITS = {"cpu_seconds": 5, "memory_bytes": 1 << 30, "wall_seconds": 10, "processes": 64}
_SECONDS_TO_END = 2  # that the subprocess has for ending what the program left


def passes(program: str) -> bool:
    """Whether a Python program ends by itself, without an exception or `exit`, within `LIMITS`.

    What the program started is ended with it. The program and its tests share one interpreter, as in HumanEval's own
    harness: one that sets out to pass can, by changing what the tests compare with, or by reading the pipe from which
    its end is proven. Programs that leave early, or write to whatever they find open, don't pass.
    """
    return _run(program, subprocess.DEVNULL)[0] == 0


@functools.cache
def walls() -> dict[str, bool]:
    """What keeps a program in on this system: whether it has no network, sees no other process, and can't write files.

    CPU, memory and time are limited on every POSIX system, processes on Linux unless the user is root. Where a wall is
    missing, programs run with the rights of the user. Without `no_other_processes` a program may end the process that
    watches it, and what it started stays only if it does that or keeps moving to new processes (elsewhere than on
    Linux: if it leaves its process group).
    """
    found: dict[str, bool] = json.loads(_run(None, subprocess.PIPE)[1])
    return found


def _run(program: str | None, stdout: int) -> tuple[int, str]:
    """The child's exit status and what it printed. A program that can reach its stdout could print without end."""
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
        except subprocess.TimeoutExpired:  # it can't keep up with what the program starts
            child.kill()
        finally:
            child.terminate()  # after Ctrl-C: it ends the program first
    return child.returncode, printed
