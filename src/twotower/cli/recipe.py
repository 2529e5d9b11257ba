"""Recipes: a YAML file with the values of a command's arguments and options, which the command line overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml


def read_recipe(file: Path, parameters: Sequence[Any]) -> dict[str, Any]:
    """The file's values by the parameters' names.

    A key is a parameter's name, such as batch_size, or a spelling of its option, with - or _ between words. Only
    options that may be given several times have lists. Raises ValueError for a key that no parameter has, for one that
    is there twice, and for a value that is none.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, must hold keys and values such as steps: 1000")
    # Of an argument and an option of one spelling, the argument, which comes first, is meant.
    known = {key: parameter for parameter in reversed(parameters) for key in _keys(parameter)}
    unknown = sorted(str(key) for key in values if _key(key) not in known)
    if unknown:
        names = sorted(parameter.name for parameter in parameters)
        raise ValueError(f"{file} has unknown keys {unknown}; known are {names}; correct the spelling")
    found: dict[str, Any] = {}
    for key, value in values.items():
        parameter = known[_key(key)]
        if parameter.name in found:
            raise ValueError(f"{file} says {parameter.name} twice, the second time as {key}; take one of them out")
        found[parameter.name] = _read(file, key, value, parameter)
    return found


def _keys(parameter: Any) -> set[str]:
    return {parameter.name, *(_key(flag.removeprefix("--")) for flag in parameter.opts)}


def _key(written: object) -> str:
    return str(written).replace("-", "_")


def _read(file: Path, key: object, value: Any, parameter: Any) -> Any:
    """The value of a key, a list for an option that may be given several times."""
    several = getattr(parameter, "multiple", False)
    is_switch = getattr(parameter, "is_flag", False)
    for one in value if several and isinstance(value, list) else [value]:
        if not isinstance(one, str | int | float | bool):
            rule = "one value, or a list of them" if several else "one value"
            raise ValueError(f"{key} is {value!r} in {file}, must be {rule}; leave the line out for the default")
        if isinstance(one, bool) and not is_switch:
            raise ValueError(f"{key} is {value!r} in {file}, must be a value of {parameter.opts[0]}; correct it")
    return [value] if several and not isinstance(value, list) else value


def _use(context: typer.Context, file: Path | None) -> Path | None:
    if file is not None:
        own = [p for p in context.command.params if p.name and p.name != "recipe"]
        context.default_map = read_recipe(file, own)
    return file


RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        "--config",
        exists=True,
        dir_okay=False,
        is_eager=True,  # read first: its values are the defaults of all other options
        callback=_use,
        help="YAML file with values for these arguments and options, by name or spelling; what is given here wins.",
        show_default="none",
    ),
]
