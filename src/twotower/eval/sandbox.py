"""Programs that a model wrote, run in a subprocess that is shut in as far as the system allows."""

import functools
import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
LIMITS = {"cpu_seconds": 5, "memory_bytes": 1 << 30, "wall_seconds": 10}


def passes(program: str) -> bool:
    """Whether a Python program ends by itself, without an exception or `exit`, within `LIMITS`."""
    sign = secrets.token_hex(16)  # leaving early with status 0 doesn't pass
    return _run({"program": program, "sign": sign}).endswith(sign)


@functools.cache
def walls() -> dict[str, bool]:
    """What keeps a program in on this system: whether it has no network, sees no other process, and can't write files.

    `LIMITS` hold on every POSIX system. Where a wall is missing, programs run
    with the rights of the user.
    """
    found: dict[str, bool] = json.loads(_run({"program": None, "sign": ""}))
    return found


def _run(job: dict[str, str | None]) -> str:
    """What the child printed, "" if it was killed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-S", str(_CHILD)]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(job | LIMITS),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",  # a program can reach the pipe and write anything
                timeout=LIMITS["wall_seconds"] + 1,
                cwd=folder,
                env={},
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return ""
    return done.stdout
