"""The command as a whole: what it imports, and how it fails."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import twotower
from twotower.cli.main import _COMMANDS


def test_help_lists_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    for name, line in _COMMANDS.items():
        assert name in result.stdout
        assert line in result.stdout


def test_the_version_is_that_of_the_package(run):
    assert run("--version").stdout == f"{twotower.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize(("line", "offered"), [("twotower tok", "tokenize"), ("twotower init --block", "--block-size")])
def test_the_shell_completes_commands_and_their_options(line, offered):
    program = "from twotower.cli.main import app; app(prog_name='twotower')"
    asking = {"_TWOTOWER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | asking)
    assert done.stdout.split() == [offered]


def test_help_does_not_import_torch():
    program = """
import sys
from typer.testing import CliRunner
from twotower.cli.main import app
result = CliRunner().invoke(app, ["--help"])
assert result.exit_code == 0, result.output
heavy = {"torch", "tokenizers", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_option_is_explained(run, name):
    for command in importlib.import_module(f"twotower.cli.{name}").app.registered_commands:
        result = run(*([name] if command.name == name else [name, command.name]), "--help")
        assert result.exit_code == 0
        shown = " ".join(result.stdout.split())
        parameters = inspect.signature(command.callback).parameters.values()
        for parameter in (p for p in parameters if p.annotation is not typer.Context):
            [described] = (m for m in parameter.annotation.__metadata__)
            # a hyphenated word may be broken after its hyphen
            assert described.help.replace(" ", "") in shown.replace(" ", ""), parameter.name


def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path):
    result = run("generate", "a", "--model", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: there is no directory")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("eval --threshold 1.5", "--threshold is 1.5, must be a number in [0, 1]"),
        ("sweep --out {out} --thresholds 0.5,2", "--thresholds is 2.0, must be a number in [0, 1]"),
        ("bench decode --threshold 2", "--threshold is 2.0, must be a number in [0, 1]"),
        ("sample stories {out} --temperatures 0,500", "--temperatures is '0.0,500.0', must be numbers in [0, 100]"),
        ("train stories {out} {out} --phases 0:0", "--phases is '0:0', must be of blocks of at least 1 token"),
    ],
)
def test_a_setting_is_told_as_the_command_line_spells_it(run, tmp_path, command, told):
    result = run(*command.format(out=tmp_path / "out").split())
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.split())


def test_a_defect_keeps_its_traceback(run, checkpoint, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("twotower.cli.generate.open_model", broken)
    result = run("generate", "a", "--model", checkpoint)
    assert isinstance(result.exception, KeyError)


def test_an_interrupt_exits_130(run, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("twotower.cli.generate.open_model", interrupted)
    result = run("generate", "a")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_an_unknown_command_suggests_one(run):
    result = run("generat")
    assert result.exit_code == 2
    assert "generate" in result.stderr


@pytest.mark.slow
def test_a_closed_pipe_is_quiet(checkpoint: Path):
    program = "from twotower.cli.main import app; app()"
    command = [sys.executable, "-c", program, "generate", "a", "--model", str(checkpoint), "--json"]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout is not None
    done.stdout.close()
    _, errors = done.communicate()
    assert done.returncode == 1
    assert errors == b""
