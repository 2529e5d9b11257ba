"""Recipes: a YAML file with the values of a command's arguments and options, which the command line overrides."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml


def read_recipe(file: Path, names: set[str], switches: set[str]) -> dict[str, Any]:
    """The file's values by option name, such as batch_size. Raises ValueError for a key that is in none of `names`, and
    for true or false where the key isn't one of the `switches`."""
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, must hold keys and values such as steps: 1000")
    unknown = sorted(set(map(str, values)) - names)
    if unknown:
        raise ValueError(f"{file} has unknown keys {unknown}; known are {sorted(names)}; correct the spelling")
    for key, value in values.items():
        if not isinstance(value, str | int | float | bool):
            raise ValueError(f"{key} is {value!r} in {file}, must be one value; leave the line out for the default")
        if isinstance(value, bool) and key not in switches:
            raise ValueError(f"{key} is {value!r} in {file}, must be a value of --{key.replace('_', '-')}; correct it")
    return values


def _use(context: typer.Context, file: Path | None) -> Path | None:
    if file is not None:
        names = {parameter.name for parameter in context.command.params if parameter.name} - {"recipe"}
        switches = {p.name for p in context.command.params if p.name and getattr(p, "is_flag", False)}
        context.default_map = read_recipe(file, names, switches)
    return file


RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        exists=True,
        dir_okay=False,
        is_eager=True,  # read first: its values are the defaults of all other options
        callback=_use,
        help="YAML file with values for these arguments and options, by their names; what is given here wins.",
        show_default="none",
    ),
]
