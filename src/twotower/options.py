"""Settings declared once: a field of a frozen dataclass says its type, default, allowed range and help.

The command line, recipe files and the documentation are made from these fields, and `check_options` holds a value from
Python to the same ranges.
"""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, get_origin

from twotower.errors import SettingError, check_choice, check_flag


class Option(NamedTuple):
    """What a field says beside its type and default.

    `least` and `most` belong to the range, `above` and `below` bound it without belonging to it. `shown_default` is
    shown for a default that is worked out later. `flag` is the option's spelling where it isn't the field's,
    `other_flag` a second one, which other servers have; `envvar` is an environment variable that sets it, `unit` what a
    number on the command line counts, such as 2**20 for MiB of bytes, `parse` reads a text where the field's type
    doesn't say how, and `fix` is what the error for a number out of the range advises.
    """

    help: str
    least: float | None
    most: float | None
    above: float | None
    below: float | None
    shown_default: str | None
    flag: str | None
    other_flag: str | None
    envvar: str | None
    unit: int
    parse: Callable[[str], Any] | None
    fix: str

    @property
    def range(self) -> str:
        """The range in words, such as "at least 1" or "in [0, 1)"; "" without one."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            brackets = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f"in {brackets[0]}{low:g}, {_written(high)}{brackets[1]}"
        if low is not None:
            return f"at least {low:g}" if self.above is None else f"above {low:g}"
        return ""

    def holds(self, number: float) -> bool:
        """Whether a number is finite and in the range."""
        return (
            -math.inf < number < math.inf  # math.isfinite can't take an integer beyond the floats
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def _written(bound: float) -> str:
    return "2**63" if bound == 2**63 else f"{bound:g}"


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    shown_default: str | None = None,
    flag: str | None = None,
    other_flag: str | None = None,
    envvar: str | None = None,
    unit: int = 1,
    parse: Callable[[str], Any] | None = None,
    fix: str = "",
) -> Any:
    """A dataclass field with a default and an `Option`, where the arguments are explained."""
    what = Option(help, least, most, above, below, shown_default, flag, other_flag, envvar, unit, parse, fix)
    return dataclasses.field(default=default, metadata={"option": what})


def options_of(settings: type) -> dict[str, tuple[dataclasses.Field[Any], Option]]:
    """The fields of a dataclass that are options, by name and in order."""
    fields = dataclasses.fields(settings)
    return {field.name: (field, field.metadata["option"]) for field in fields if "option" in field.metadata}


def is_optional(kind: Any) -> bool:
    """Whether a type is that of a value or None."""
    return isinstance(kind, types.UnionType) and type(None) in get_args(kind)


def is_tuple(kind: Any) -> bool:
    """Whether a type is a tuple's, or that of a tuple or None."""
    return get_origin(_given(kind)) is tuple


def value_type(kind: Any) -> Any:
    """The type without None, of an element where it is a tuple's."""
    kind = _given(kind)
    return get_args(kind)[0] if get_origin(kind) is tuple else kind


def _given(kind: Any) -> Any:
    """The type without None."""
    if is_optional(kind):
        [kind] = (one for one in get_args(kind) if one is not type(None))
    return kind


def check_options(settings: Any) -> None:
    """Raises SettingError for the first option of a dataclass whose value isn't of its type or in its range."""
    for name, (field, what) in options_of(type(settings)).items():
        value, kind = getattr(settings, name), value_type(field.type)
        if value is None and is_optional(field.type):
            continue
        if not is_tuple(field.type):
            _check(name, value, kind, what, value)
        elif not isinstance(value, tuple):
            raise SettingError(name, value, "a tuple")
        else:
            for element in value:
                _check(name, element, kind, what, value)


def _check(name: str, value: Any, kind: Any, what: Option, whole: Any) -> None:
    if get_origin(kind) is Literal:
        check_choice(name, value, get_args(kind))
    elif kind is bool:
        check_flag(name, value)
    elif kind is str and not isinstance(value, str):
        raise SettingError(name, whole, "a text")
    elif kind in (int, float):
        accepted = int if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, accepted) or not what.holds(value):
            noun = {int: ("an integer", "integers"), float: ("a number", "numbers")}[kind][whole is not value]
            raise SettingError(name, whole, f"{noun} {what.range.replace('at', 'of at', 1)}".strip(), what.fix)
