"""The `twotower` command: its list of sub-commands, and what the user sees of an error."""

import errno
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

import twotower
from twotower.cli.threads import settle_threads
from twotower.errors import SettingError

# Sub-command -> the line that `twotower --help` shows for it; its file has the same name.
_COMMANDS = {
    "demo": "Watch questions answered by diffusion and by autoregression.",
    "generate": "Continue prompts in any decoding mode, with a live view.",
    "chat": "Chat in the terminal, with a model or a server.",
    "init": "Make a two-tower checkpoint from a single-tower model.",
    "inspect": "Show a checkpoint's parameters, memory and errors.",
    "pretrain": "Train a single tower from nothing, to make two of it.",
    "sample": "Write a training corpus with the context tower itself.",
    "tokenize": "Write a training corpus from text.",
    "ngrams": "Count n-grams of a corpus for a checkpoint, to draft from.",
    "train": "Train a denoiser for a checkpoint on text or a corpus of tokens.",
    "calibrate": "Find commits of diffusion that keep a share of ar's score.",
    "eval": "Measure what each mode keeps of ar's quality, and its speed.",
    "sweep": "Measure both over a grid of settings, with tables and pictures.",
    "serve": "Serve OpenAI's and Anthropic's APIs and a page, in every mode.",
    "doctor": "Show this machine, the backend chosen, and what slows it down.",
    "bench": "Measure the speed of the decoding modes, or of a server.",
}

# What the library raises at a user's mistake. Anything else is our defect and shows its traceback.
_MISTAKES = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
# Where a context keeps the sub-command that was called
_COMMAND = "twotower.cli.command"
# Settings that options give another name
_SHORT = {"confidence_threshold": "threshold"}
# A full disk, a full quota, a limit on files
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _LazyGroup(TyperGroup):
    """Imports a sub-command's file when it is called, so that `twotower --help` need not wait for torch."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        settle_threads(os.environ)
        module = importlib.import_module(f"twotower.cli.{name}")
        command = ctx.meta[_COMMAND] = typer.main.get_command(module.app)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            with _short_warnings():
                return super().invoke(ctx)
        except SettingError as error:
            if isinstance(error.value, tuple):  # several values stand with commas here
                error = SettingError(error.name, ",".join(map(str, error.value)), error.rule, error.fix)
            _complain("Error", error.told(_spelling(error.name, ctx.meta.get(_COMMAND))), "bold red")
            raise typer.Exit(2) from None
        except _MISTAKES as error:
            _complain("Error", str(error), "bold red")
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            _complain("Error", f"{error}; make room and call again", "bold red")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _spelling(name: str, command: Any) -> str:
    """How the command line spells a setting: the option that sets it or takes several values of it, or the name where
    none does."""
    commands = [command, *getattr(command, "commands", {}).values()]
    options = {
        parameter.name: parameter.opts[0] for one in reversed(commands) for parameter in getattr(one, "params", [])
    }
    short = _SHORT.get(name, name)
    return next((options[one] for one in (name, short, f"{name}s", f"{short}s") if one in options), name)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Shows warnings as one line without the source line they come from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _complain("Warning", str(message), "yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _complain(kind: str, message: str, style: str) -> None:
    line = Text.assemble((f"{kind}: ", style), " ".join(message.split()))
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)


app = typer.Typer(
    cls=_LazyGroup,
    help="Two-tower diffusion language models: decode, convert, inspect, train and measure them.",
    no_args_is_help=True,
    # The rich form squeezes long options into columns a few letters wide.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(twotower.__version__)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _declare(name: str, line: str) -> None:
    """Registers a command that only has its help; `_LazyGroup` puts the real one in its place."""

    @app.command(name, help=line)
    def declared() -> None:
        raise AssertionError(f"{name} was called without being loaded")


for _name, _line in _COMMANDS.items():
    _declare(_name, _line)
