"""A command's options from the fields of a dataclass, which the command gets whole."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from twotower.cli.settings import with_settings
from twotower.options import check_options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oven:
    heat: float = option(180.0, "Degrees.", least=50, most=250, flag="--degrees")
    fan: bool = option(False, "Turn the fan on.")
    shelf: Literal["low", "high"] = option("low", "Where it goes.")
    minutes: int | None = option(None, "How long.", least=1, shown_default="until done")
    turns: tuple[int, ...] = option((3, 7), "Minutes at which it is turned.")
    notes: tuple[str, ...] = option((), "What to write down.", shown_default="none")
    racks: tuple[Path, ...] = option((), "Paths.", parse=lambda text: tuple(map(Path, text.split(":"))))

    bytes: int = option(3 * 2**20, "Size of the recipe.", least=1, flag="--mib", unit=2**20)

    def __post_init__(self) -> None:
        check_options(self)


@pytest.fixture
def bake():
    """Calls the command and returns its result, and what it got."""
    app, got = typer.Typer(), []

    @app.command()
    @with_settings
    def command(name: Annotated[str, typer.Argument()], *, oven: Oven, loud: bool = False) -> None:
        got.append((name, oven, loud))

    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments]), got

    return call


def test_the_command_gets_the_dataclass(bake):
    options = ("--degrees", 200, "--fan", "--shelf", "high", "--minutes", 9, "--turns", "1,2", "--notes", "a",
               "--notes", "b", "--racks", "a:b", "--mib", 2, "--loud")  # fmt: skip
    result, got = bake("dinner", *options)
    assert result.exit_code == 0, result.output
    oven = Oven(
        heat=200.0,
        fan=True,
        shelf="high",
        minutes=9,
        turns=(1, 2),
        notes=("a", "b"),
        racks=(Path("a"), Path("b")),
        bytes=2**21,
    )
    assert got == [("dinner", oven, True)]


def test_help_shows_ranges_and_defaults(bake):
    shown = " ".join(bake("--help")[0].stdout.replace("│", " ").split())
    for part in (
        "--degrees",
        "Degrees. In [50, 250].",
        "[default: 180.0]",
        "--no-fan",
        "(until done)",
        "[default: 3,7]",
    ):
        assert part in shown


def test_what_the_dataclass_refuses_is_refused(bake):
    assert str(bake("dinner", "--degrees", 20)[0].exception).startswith("heat is 20.0")
    assert "numbers with commas" in str(bake("dinner", "--turns", "a")[0].exception)
