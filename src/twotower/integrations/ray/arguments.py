"""Reading what `serve run … KEY=VALUE` and configuration files of Ray Serve give: the settings of `twotower serve`."""

import dataclasses
import os
from pathlib import Path
from typing import Any, get_origin

from twotower.engine.config import EngineConfig
from twotower.errors import SettingError
from twotower.integrations.ray.config import Launch, ReplicaConfig
from twotower.options import Option, is_tuple, options_of, value_type
from twotower.server.config import ServerConfig, read_keys, served_name

_PLACES = ("model", "device", "context_device", "denoiser_device", "dtype")
_FILES = ("api_key_file", "chat_template")
# What Ray's own proxies do, or what they are told by Ray's settings.
_OF_RAY = ("host", "port", "ssl_certfile", "ssl_keyfile")


def read(arguments: dict[str, Any]) -> tuple[Launch, ReplicaConfig]:
    """What replicas are started from, of arguments by name or by an option's spelling, with - or _ between words.

    Environment variables give what arguments don't, as on the command line. Raises ValueError for unknown arguments,
    and SettingError for values that are not allowed.
    """
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in arguments.items()}
    server, limits, config = (_settings(made, given) for made in (ServerConfig, EngineConfig, ReplicaConfig))
    places: dict[str, Any] = {name: str(given.pop(name)) for name in _PLACES if name in given}
    files = {name: Path(given.pop(name)) for name in _FILES if name in given}
    if given:
        raise ValueError(f"unknown arguments {sorted(given)}; `twotower serve --help` has those that there are")
    if "api_key_file" in files:
        server = dataclasses.replace(server, api_keys=server.api_keys + read_keys(files["api_key_file"]))
    names = server.model_names or (served_name(places.get("model")),)
    launch = Launch(server=dataclasses.replace(server, model_names=names), limits=limits, **places)
    return launch.with_template(files.get("chat_template")), config


def _settings(made: type, given: dict[str, Any]) -> Any:
    """The settings of one dataclass, whose arguments are taken out of `given`."""
    values = {}
    for name, (field, what) in options_of(made).items():
        spellings = [
            name,
            *(flag.removeprefix("--").replace("-", "_") for flag in (what.flag, what.other_flag) if flag),
        ]
        for spelling in spellings:
            if spelling in given:
                if name in _OF_RAY:
                    raise SettingError(spelling, given[spelling], "left out", "Ray's proxies listen; see serve.start")
                # 256 MiB are state_mib: 256 and state_bytes: 268435456
                unit = 1 if spelling == name else what.unit
                values[name] = _value(spelling, given.pop(spelling), field.type, what, unit)
        if name not in values and what.envvar is not None and os.environ.get(what.envvar):
            values[name] = _value(what.envvar, os.environ[what.envvar], field.type, what, 1)
    return made(**values)


def _value(name: str, value: Any, kind: Any, what: Option, unit: int) -> Any:
    """A value of an option's type, of a text or of what YAML makes of it."""
    if what.parse is not None:
        return what.parse(value)
    if is_tuple(kind):
        parts = (
            value.replace(",", " ").split() if isinstance(value, str) else value if isinstance(value, list) else [value]
        )
        return tuple(_one(name, part, value_type(kind)) for part in parts)
    one = _one(name, value, value_type(kind))
    return one * unit if unit > 1 else one


def _one(name: str, value: Any, kind: Any) -> Any:
    if kind not in (int, float):
        return value if get_origin(kind) is not None else str(value)
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise SettingError(name, value, "an integer" if kind is int else "a number") from error
