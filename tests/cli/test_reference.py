"""The command line as Markdown: every command and option, in tables that hold."""

import importlib
import re

import pytest
from typer.main import get_command

from twotower.cli.main import _COMMANDS
from twotower.cli.reference import markdown


@pytest.fixture(scope="module")
def page():
    return markdown()


def test_every_command_has_a_section_with_its_options(page):
    sections = dict(re.findall(r"^## twotower ([\w ]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert [name for name in sections if " " not in name] == list(_COMMANDS)
    assert {"bench decode", "bench serve"} <= set(sections)
    command = get_command(importlib.import_module("twotower.cli.train").app)
    for option in command.params:
        assert f"| `{option.opts[0]}" in sections["train"]
    assert "[default: 1000]" in sections["train"]


def test_no_cell_ends_early_and_nothing_is_read_as_html(page):
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {3}
    assert "<" not in re.sub(r"`[^`]*`", "", page)
