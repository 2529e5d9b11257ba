"""twotower_calibration.json: the calibrated commit rules of a checkpoint, beside its weights."""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.hf.config_file import read_object
from twotower.model.calibration import CalibratedRule, Calibration

CALIBRATION_FILE = "twotower_calibration.json"

_VERSION = 1
_SAMPLES = 64
_AGAIN = "make it again with: twotower calibrate CHECKPOINT PROMPTS"


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What tells a model's weights from others, given its released tensors by name, in any order.

    It is a hash of their names and shapes and of 64 values of each, rounded to bfloat16, so that it is the same in
    every dtype that a checkpoint is opened in.
    """
    lines = []
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
        values = flat[places.to(flat.device)].to(torch.bfloat16).view(torch.int16)
        lines.append(f"{name} {tuple(tensor.shape)} {values.tolist()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


def calibration_bytes(calibration: Calibration) -> bytes:
    """The content of the file."""
    fields = dataclasses.asdict(calibration)
    fields["rules"] = [json.dumps(rule) for rule in fields["rules"]]
    # a line for each rule: thresholds alone on a line each would be thousands of lines
    rules = ",\n  ".join(fields.pop("rules"))
    head = json.dumps({"version": _VERSION, **fields}, indent=1, ensure_ascii=False)
    return f'{head[:-2]},\n "rules": [\n  {rules}\n ]\n}}\n'.encode()


def write_calibration(directory: Path, calibration: Calibration) -> Path:
    """Puts the file into a checkpoint's directory, whole or not at all, and returns its path."""
    file = directory / CALIBRATION_FILE
    staged = file.with_suffix(".incomplete")
    staged.write_bytes(calibration_bytes(calibration))
    staged.replace(file)
    return file


def read_calibration(directory: Path, tensors: Iterable[tuple[str, Tensor]] | None) -> Calibration | None:
    """The calibration of a checkpoint directory whose model has these released tensors, which None doesn't compare;
    None without one.

    Warns of one that is of another version or of other weights, which counts for nothing. Raises ValueError for a
    broken file.
    """
    file = directory / CALIBRATION_FILE
    raw = read_object(file)
    if not raw:
        return None
    version = raw.pop("version", None)
    if version != _VERSION:
        _warn(f"{file} has version {version!r}, and this program reads {_VERSION}: it is ignored; {_AGAIN}")
        return None
    calibration = _calibration(file, raw)
    if tensors is not None and calibration.fingerprint != fingerprint(tensors):
        _warn(f"{file} was made for other weights than those beside it: it is ignored; {_AGAIN}")
        return None
    return calibration


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _calibration(file: Path, raw: Mapping[str, Any]) -> Calibration:
    """The file's content. Raises ValueError for what is no calibration."""
    try:
        rules = tuple(
            CalibratedRule(
                risk=_number(rule["risk"], 1),
                thresholds=tuple(tuple(_number(t, 1) for t in row) for row in rule["thresholds"]),
                shown=_number(rule["shown"], 1),
                tokens_per_nfe=_number(rule["tokens_per_nfe"]),
                held_out=tuple(None if x is None else _number(x) for x in rule["held_out"]),  # type: ignore[arg-type]
            )
            for rule in raw["rules"]
        )
        found = Calibration(**{**raw, "rules": rules})
        for name, kind in (("block_size", int), ("steps_per_block", int), ("num_prompts", int), ("prompts", str)):
            if not isinstance(raw[name], kind):
                raise ValueError(f"{name} is {raw[name]!r}")
        size = found.block_size
        whole = all(len(rule.thresholds) == size == len(row) for rule in rules for row in rule.thresholds)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no calibration ({error}); {_AGAIN}, or delete it") from error
    if not whole or any(len(rule.held_out) != 3 for rule in rules):
        raise ValueError(f"{file} has rules that are not for blocks of {size!r} places; {_AGAIN}, or delete it")
    return found


def _number(value: Any, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is not a number in [0, {most:g}]")
    return float(value)
