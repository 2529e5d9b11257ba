"""Commands on pages and at the heads of scripts and recipes are read by the parsers of what they call, and not run."""

import argparse
import contextlib
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from twotower.cli.main import _COMMANDS, app
from twotower.eval import lm_eval

ROOT = Path(__file__).parents[2]
# The log and the changes say what was called once
PAGES = [
    *(page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"),
    *(page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"),
    *(ROOT / "recipes").glob("*/README.md"),
]
FOLDERS = ("benchmarks", "recipes", "examples", "docs")
SCRIPTS = [
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".service")
]
CALLED = r"(?:\S*python|torchrun|twotower)"
UsageError = typer.BadParameter.__base__
FILES = {"--file", "--prompts", "--api-key-file"}  # options whose file must be there
OUR_SCRIPT = re.compile(r"(?:benchmarks|recipes|examples|docs)/\S+\.py")


def spelled(command: str) -> list[str]:
    """The words of a command; of what may be left out or repeated, once: `[--only NAME …]`, `float32|bfloat16`."""
    command = re.sub(r"(?<=\w)\|[\w|]+|…|\.\.\.", "", command)
    return shlex.split(re.sub(r"[\[\]]", "", command), comments=True)


def lines_of(script: str) -> Iterator[str]:
    """The simple commands of a shell script."""
    for line in script.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|;| [|>] ", line.split(" #")[0]):
            yield re.sub(r"^\s*(?:\$ |for .* do |do )?", "", command).strip()


def commands_of(path: Path) -> Iterator[str]:
    """What a file tells to call: in its blocks of shell and in backticks, or on lines of its own or behind a colon."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blocks = re.findall(r"^```(?:sh|text)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        yield from (line for block in blocks for line in lines_of(block) if re.match(rf"{CALLED} ", line))
        rest = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        yield from (" ".join(code.split()) for code in re.findall(rf"`({CALLED} [^`]+)`", rest))
    else:
        text = re.sub(r"\\\n#?", " ", text)
        found = lines_of(
            "\n".join(re.findall(rf"^(?:#.*|    )\b({CALLED} (?:\S+\.py|-m|[a-z]+ )[^`\n]*)$", text, re.M))
        )
        yield from (line for line in found if re.match(rf"{CALLED} ", line))


def read_by_twotower(words: list[str]) -> None:
    """Raises UsageError for what `twotower` refuses."""
    if words[0].startswith("--"):  # some act while they are read
        options = typer.main.get_command(app).params
        assert {*words} <= {"--help", *(spelling for option in options for spelling in option.opts)}
        return
    assert words[0] in _COMMANDS, words
    command, words = typer.main.get_command(importlib.import_module(f"twotower.cli.{words[0]}").app), words[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if words:  # a bare name speaks of the command
        with contextlib.suppress(typer.Exit):  # what --help ends with
            command.make_context("twotower", words)


class Read(Exception):
    """The arguments have been read."""


def read_by_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises ArgumentError where the script's own parser refuses; a script without a parser takes no arguments."""
    source = Path(words[0]).read_text(encoding="utf-8")
    if "argparse" not in source:
        assert len(words) == 1 or "sys.argv" in source, words
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *_):
        parse(self, words[1:])
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(Path(words[0]).parent))
    with pytest.raises(Read):
        runpy.run_path(words[0], run_name="__main__")


def read(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "torchrun":
        assert "-m" in words, f"torchrun takes twotower for a file without -m: {words}"
        words = ["python", *words[words.index("-m") :]]
    if words[0].endswith("python"):
        words = words[1:]
        if words[:2] == ["-m", "twotower"]:
            words = words[1:]
        elif words[0] == "-m":
            assert words[1] == lm_eval.__name__, words
            return  # lm-evaluation-harness reads the rest
        else:
            assert OUR_SCRIPT.fullmatch(words[0]), words
            assert Path(words[0]).is_file(), words
            read_by_script(words, monkeypatch)
            return
    read_by_twotower(words[1:])


FOUND = [(path, command) for path in sorted({*PAGES, *SCRIPTS}) for command in commands_of(path)]


@pytest.mark.parametrize(
    ("path", "command"), FOUND, ids=[f"{path.relative_to(ROOT)}: {command}" for path, command in FOUND]
)
def test_a_command_is_read_by_its_parser(path, command, monkeypatch, tmp_path):
    words = spelled(command)
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(ROOT / folder)
    for option in FILES & {*words}:
        (tmp_path / words[words.index(option) + 1]).touch()
    monkeypatch.chdir(tmp_path)
    read(words, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "twotower train START corpus run --steps 10 --no-such-option 3",
        "twotower train START corpus run --steps many",
        "twotower no-such-command hybrid",
        "twotower train --recipe recipes/hybrid/nothing.yaml",
        "torchrun --nproc-per-node 2 twotower train START corpus run",
        "python benchmarks/nothing.py",
        "python benchmarks/training_pass.py --no-such-option",
        "python examples/score_texts.py --no-such-option",
    ],
)
def test_a_command_that_would_fail_is_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, UsageError)):
        read(command.split(), monkeypatch)


def test_commands_are_found_where_they_stand(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "`python benchmarks/a.py\n--b`\n\n```sh\ncd x && twotower train \\\n  a b c   # why\n"
        "for part in a b; do\n  twotower tokenize $part\ndone\necho x | twotower chat\n```\n"
    )
    assert list(commands_of(page)) == [
        "twotower train    a b c",
        "twotower tokenize $part",
        "twotower chat",
        "python benchmarks/a.py --b",
    ]
    assert {path.parent.name for path, _ in FOUND if path.name == "train.yaml"} >= {"hybrid", "stories", "nemotron-30b"}
