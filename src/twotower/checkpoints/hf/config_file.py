"""config.json, and the dtype that it names."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from twotower.config import TwoTowerConfig
from twotower.errors import SettingError

CONFIG_FILE = "config.json"

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# transformers 5 renamed the first to the second.
_DTYPE_KEYS = ("torch_dtype", "dtype")
# How weights were stored: they are written as floats.
_QUANTISED_KEYS = ("quantization_config", "compression_config")


def read_raw_config(directory: Path) -> dict[str, Any]:
    """Any model's config.json, unchecked; {"__float__": "Infinity"}, which transformers writes, becomes a float.

    Raises FileNotFoundError without one, and ValueError where it is not a JSON object.
    """
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG_FILE}; give a model's directory")
    return read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file, in which {"__float__": "Infinity"} is a float; empty without the file.

    Raises ValueError for a file that holds anything else.
    """
    if not file.is_file():
        return {}

    def number(entry: dict[str, Any]) -> Any:
        return float(entry["__float__"]) if set(entry) == {"__float__"} else entry

    try:
        # Some editors begin a file with a byte order mark
        raw = json.loads(file.read_text(encoding="utf-8-sig"), object_hook=number)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; download it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}, not an object; download it again")
    return raw


def config_bytes(config: TwoTowerConfig) -> bytes:
    """The content of a config.json, as `TwoTowerConfig.to_json` writes it, for weights that are floats."""
    return json.dumps({k: v for k, v in config.to_dict().items() if k not in _QUANTISED_KEYS}, indent=1).encode()


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype given as itself or by name, such as "float32". Raises SettingError for one that no model is held in."""
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise SettingError("dtype", dtype, f"one of {', '.join(_DTYPES)}", "or None to keep the checkpoint's")
    return found


def stored_dtype(config: TwoTowerConfig) -> torch.dtype | None:
    """The dtype that the config names, or None. Raises ValueError for one that no model is held in."""
    for key in _DTYPE_KEYS:
        name = config.carried.get(key)
        if name is not None:
            if name not in _DTYPES:
                raise ValueError(f"{key} is {name!r} in {CONFIG_FILE}, must be one of {sorted(_DTYPES)}; correct it")
            return _DTYPES[name]
    return None


def with_stored_dtype(config: TwoTowerConfig, dtype: torch.dtype) -> TwoTowerConfig:
    """The config with `dtype` as the dtype it names, if it names one."""
    name = str(dtype).removeprefix("torch.")
    named = {key: name for key in _DTYPE_KEYS if key in config.carried}
    return dataclasses.replace(config, carried={**config.carried, **named})
