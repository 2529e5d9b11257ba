"""A tiny checkpoint with every kind of layer, and the command run in this process."""

from collections.abc import Callable
from pathlib import Path

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
