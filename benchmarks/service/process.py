"""A server as its operator sees it: a process with a log, memory, descriptors and an exit status."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

FAULTY = Path(__file__).with_name("serve_with_faults.py")
START_SECONDS = 120  # most that a server may take to load


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """`twotower serve` with some options on a port, started anew by `start`, and stopped when the context is left.

    `source` is the folder whose twotower it runs. `prefix` are words of the shell before the command, such as
    `ulimit -n 64;`. With `faulty` it fails on demand, see `serve_with_faults`.
    """

    def __init__(
        self,
        source: Path,
        log: Path,
        *options: str,
        port: int | None = None,
        prefix: str = "",
        environment: Mapping[str, str] | None = None,
        faulty: bool = False,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        program = [str(FAULTY)] if faulty else ["-m", "twotower"]
        self._command: Sequence[str] = [sys.executable, *program, "serve", "--port", str(self.port), *options]
        if prefix:
            self._command = ["bash", "-c", f'{prefix} exec "$@"', "bash", *self._command]
        self._environment = {**os.environ, "PYTHONPATH": str(source / "src"), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None, "start it first"
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, or None while it runs."""
        assert self._process is not None, "start it first"
        return self._process.poll()

    def start(self, *, wait: bool = True) -> Self:
        """Starts it; with `wait` it returns when /health says 200."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self) -> float:
        """The seconds until /health says 200."""
        began = time.perf_counter()
        while health(self.url) != 200:
            if self.status is not None:
                sys.exit(f"the server ended with {self.status}; its log is {self.log}")
            if time.perf_counter() - began > START_SECONDS:
                sys.exit(f"the server isn't ready after {START_SECONDS} s; its log is {self.log}")
            time.sleep(0.1)
        return time.perf_counter() - began

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None if it still runs after so many seconds."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def memory_mb(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)

    def cpu_seconds(self) -> float:
        """Time of processors that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def health(url: str) -> int | None:
    """The status of /health, or None where nothing answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
