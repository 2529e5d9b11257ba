"""The whole command line as a page of Markdown, made from the declarations that `--help` shows."""

from collections.abc import Iterator
from typing import Any

from typer.core import TyperGroup
from typer.main import get_command

from twotower.cli.main import app


def markdown() -> str:
    """A section for every command: its usage, its help and a table each of its arguments and its options.

    Sections are of the second level, so that the page that holds them can have a title. Imports every command.
    """
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    context: Any = root.make_context("twotower", [], resilient_parsing=True)
    return "\n".join(_sections(root, context)) + "\n"


def _sections(command: Any, context: Any) -> Iterator[str]:
    """The lines of a command's section, and then of those of its sub-commands."""
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## {context.command_path}\n\n```text\n{context.command_path} {usage}\n```\n\n{_paragraphs(command.help)}\n"
    for title, kind in (("Argument", "argument"), ("Option", "option")):
        records = [p.get_help_record(context) for p in command.get_params(context) if p.param_type_name == kind]
        if shown := [record for record in records if record is not None]:
            rows = "\n".join(f"| `{name.replace('|', ' / ')}` | {_paragraphs(text)} |" for name, text in shown)
            yield f"| {title} | |\n|---|---|\n{rows}\n"
    if isinstance(command, TyperGroup):
        for name in command.list_commands(context):
            loaded: Any = command.resolve_command(context, [name])[1]
            yield from _sections(loaded, loaded.make_context(name, [], parent=context, resilient_parsing=True))


def _paragraphs(text: str | None) -> str:
    """Help with each paragraph on one line, in which the name of a token, such as </s>, is not read as HTML."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").replace("<", "&lt;").split("\n\n"))
