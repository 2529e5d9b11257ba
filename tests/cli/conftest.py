"""A tiny checkpoint with every kind of layer, and the command run in this process."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
from typer.testing import CliRunner, Result

from twotower.checkpoints import save
from twotower.cli.main import app
from twotower.model.two_tower import TwoTower

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def model(tiny: Callable[..., TwoTower], byte_tokenizer: tokenizers.Tokenizer) -> TwoTower:
    made = tiny(vocab_size=260, block_size=8)
    made.tokenizer = byte_tokenizer
    return made


@pytest.fixture(scope="session")
def checkpoint(model: TwoTower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save(model, path)
    return path


@pytest.fixture(autouse=True)
def _moving_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terminals that tests stand in for can move the cursor, whatever the one can that they run in."""
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def run() -> Run:
    """Runs `twotower` with the given arguments; `input` is what stdin holds."""

    def call(*arguments: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return call


def hearing_signals() -> None:
    """What runs under nohup, or in the background of a script, ignores some signals, and so would what it starts."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Process(NamedTuple):
    """`twotower serve` as a process that answers at `url`, and the file of its log."""

    running: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_for(self, message: str) -> dict[str, object]:
        """The first line of the log with this message, once it is there."""
        return logged(self.running, self.log, message)


def logged(running: subprocess.Popen[bytes], log: Path, message: str) -> dict[str, object]:
    while True:
        ended = running.poll() is not None
        for line in log.read_text().splitlines():
            if line.startswith("{") and json.loads(line)["message"] == message:
                return json.loads(line)
        assert not ended, log.read_text()
        time.sleep(0.02)


@pytest.fixture
def process(checkpoint: Path, tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Process]]:
    """process(*options) runs a server, which answers requests or, with until="loading", 503; it is killed when left."""

    @contextlib.contextmanager
    def serving(*options: object, until: str = "serving", named: bool = True, **more: object) -> Iterator[Process]:
        log = tmp_path / f"log-{time.monotonic_ns()}"
        command = [sys.executable, "-c", "from twotower.cli.main import app; app()", "serve", "--model", checkpoint]
        command += ["--name", "tiny", "--max-requests", "2"] if named else []
        with log.open("w") as stderr:
            arguments = [str(part) for part in (*command, *options)]
            more = {"preexec_fn": hearing_signals} | more
            running = subprocess.Popen(arguments, stderr=stderr, stdout=subprocess.DEVNULL, **more)
            try:
                yield Process(running, str(logged(running, log, until)["url"]), log)
            finally:
                running.kill()
                running.wait()

    return serving
