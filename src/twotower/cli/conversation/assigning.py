"""Settings by name and text, as `/set NAME VALUE` gives them."""

import dataclasses
import json
from typing import Any

from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError
from twotower.options import is_tuple, options_of, value_type

_FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams)}
_FLAGS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
# What sets a setting back
DEFAULT = "default"


def setting_names() -> list[str]:
    """All that can be set."""
    return list(_FIELDS)


def with_setting(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """The settings with one changed to what a text says; "default" sets it back.

    Raises SettingError for a value that is not allowed, ValueError for a name that is none.
    """
    _check_name(name)
    value: Any = _FIELDS[name].default if text == DEFAULT else _value(name, text)
    return dataclasses.replace(params, **{name: value})


def described(params: SamplingParams, name: str) -> str:
    """A setting's value and what it means. Raises ValueError for a name that is none."""
    _check_name(name)
    found = options_of(SamplingParams).get(name)
    if found is None:
        return f"{name} = {_shown(params, name)}"
    what = found[1]
    bounds = what.range and f" {what.range[0].upper()}{what.range[1:]}."
    return f"{name} = {_shown(params, name)}\n  {what.help}{bounds}"


def listed(params: SamplingParams) -> list[str]:
    """Every setting with its value, a line each."""
    return [f"{name} = {_shown(params, name)}" for name in _FIELDS]


def _check_name(name: str) -> None:
    if name not in _FIELDS:
        raise ValueError(f"there is no setting {name!r}; there are {', '.join(_FIELDS)}")


def _shown(params: SamplingParams, name: str) -> str:
    value = getattr(params, name)
    found = options_of(SamplingParams).get(name)
    if value == _FIELDS[name].default and found is not None and found[1].shown_default:
        return found[1].shown_default
    return json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else str(value)


def _value(name: str, text: str) -> Any:
    field = _FIELDS[name]
    kind = value_type(field.type)
    found = options_of(SamplingParams).get(name)
    if found is not None and found[1].parse is not None:
        return found[1].parse(text)
    if is_tuple(field.type) and kind is str:
        return _texts(name, text)
    if kind is bool:
        if text.lower() not in _FLAGS:
            raise SettingError(name, text, "on or off")
        return _FLAGS[text.lower()]
    if kind not in (int, float):
        return text
    parts = text.split(",") if is_tuple(field.type) else [text]
    try:
        numbers = tuple(kind(part) for part in parts)
    except ValueError as error:
        rule = {int: "an integer", float: "a number"}[kind]
        raise SettingError(name, text, rule, f"/set {name} {DEFAULT} sets it back") from error
    return numbers if is_tuple(field.type) else numbers[0]


def _texts(name: str, text: str) -> tuple[str, ...]:
    """One text as it stands, or JSON: a text in quotes, whose escapes count, or a list of texts."""
    if not text.startswith(('"', "[")):
        return (text,)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SettingError(name, text, 'a text, or JSON such as ["\\n\\n", "User:"]') from error
    return tuple(value) if isinstance(value, list) else (value,)
