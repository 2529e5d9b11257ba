"""Options of a command made from the fields of dataclasses, which the command then gets whole."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from twotower.errors import SettingError
from twotower.options import Option, is_tuple, options_of, value_type


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field in the place of a parameter that is annotated with a dataclass.

    Called with the options' values, it makes the dataclasses of them. Raises SettingError where one refuses its values.
    """
    signature = inspect.signature(command)
    annotations: dict[str, Any] = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    settings: dict[str, Any] = {name: kind for name, kind in annotations.items() if dataclasses.is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name in settings:
            found = options_of(settings[parameter.name]).items()
            parameters += [_parameter(name, field, what) for name, (field, what) in found]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def called(**values: Any) -> None:
        for place, made in settings.items():
            fields = options_of(made).items()
            given = {name: _read(values.pop(_key(name, what)), field, what) for name, (field, what) in fields}
            values[place] = made(**given)
        command(**values)

    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _key(name: str, what: Option) -> str:
    """What recipes call a field: its name, or its flag's where that counts in another unit, such as state_mib."""
    return name if what.unit == 1 or what.flag is None else what.flag.removeprefix("--").replace("-", "_")


def _parameter(name: str, field: dataclasses.Field[Any], what: Option) -> inspect.Parameter:
    """The option of a field: a switch, a choice, a number or a text; of several values a text with commas between them,
    of several texts an option that may be given several times."""
    kind: Any = field.type
    default: Any = field.default
    if what.parse is not None:
        kind, default = str, "" if default == () else default
    elif is_tuple(field.type) and value_type(field.type) is str:
        kind, default = list[str] | None, None
    elif is_tuple(field.type):
        kind, default = str, ",".join(f"{value:g}" for value in default or ())
    elif what.unit > 1 and default is not None:
        default //= what.unit
    annotation = Annotated[kind, _declared(name, what)]
    return inspect.Parameter(_key(name, what), inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def like(settings: type, name: str) -> Any:
    """The typer option of one field, for a command that takes this field but not all of the dataclass."""
    return _declared(name, options_of(settings)[name][1])


def _declared(name: str, what: Option) -> Any:
    flags = [] if what.flag is None else [what.flag]
    if what.other_flag is not None:
        flags = [what.flag or f"--{name.replace('_', '-')}", what.other_flag]
    bounds = what.range and f" {what.range[0].upper()}{what.range[1:]}."
    return typer.Option(
        *flags,
        help=what.help + bounds,
        envvar=what.envvar,
        show_default=what.shown_default or True,
    )


def _read(value: Any, field: dataclasses.Field[Any], what: Option) -> Any:
    """The field's value of what the command line or a recipe gives."""
    if what.parse is not None:
        return what.parse(value)
    if not is_tuple(field.type):
        return value if value is None else value * what.unit if what.unit > 1 else value
    kind = value_type(field.type)
    if kind is str:
        return tuple(value or ())
    if not value and not field.default:
        return field.default
    try:
        return tuple(kind(part) for part in value.split(","))
    except ValueError as error:
        raise SettingError(field.name, value, "numbers with commas between them, such as 0,1") from error
