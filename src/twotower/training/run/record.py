"""What is written about a run beside its numbers: every call that trained it, with its command, versions and settings.

OUT/runs.jsonl                 a line for each call, written when it begins
OUT/checkpoint/training.json   the calls that made these weights, and how far they are trained
"""

import json
import platform
import socket
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from twotower.checkpoints.hf.tokenizer_file import TRAINING_FILE
from twotower.origin import command, commit
from twotower.training.run.ranks import Ranks

RUNS_FILE = "runs.jsonl"
# What may make the last bits of numbers others.
_ROUNDING = ("twotower", "torch", "ranks", "device")


def this_call(settings: Mapping[str, Any], ranks: Ranks, step: int) -> dict[str, Any]:
    """This call of a command or function, which goes on after `step` steps: when, how, with what and where."""
    return {
        "began": datetime.now().astimezone().isoformat(timespec="seconds"),
        "from_step": step,
        "command": command(),
        # not imported: the package's front imports all that is above this file
        "twotower": sys.modules["twotower"].__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "device": str(ranks.device),
        "ranks": ranks.size,
        "threads": torch.get_num_threads(),
        "settings": dict(settings),
    }


def moved(last: Mapping[str, Any], call: Mapping[str, Any]) -> list[str]:
    """In which versions and devices a call differs from the `last` one."""
    return [f"{name} is {call[name]} and was {last[name]}" for name in _ROUNDING if call[name] != last[name]]


def append(folder: Path, call: Mapping[str, Any]) -> None:
    """Adds a call to those of the run in `folder`."""
    with (folder / RUNS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


def training_document(progress: Mapping[str, Any]) -> bytes:
    """The content of a checkpoint's training.json, from the progress of the state that it is made of."""
    told = {name: progress[name] for name in ("step", "samples", "tokens", "run", "calls") if name in progress}
    return (json.dumps(told, indent=1) + "\n").encode()


def trained_step(checkpoint: Path) -> int | None:
    """The number of steps that a checkpoint's training.json says; None without one."""
    file = checkpoint / TRAINING_FILE
    return int(json.loads(file.read_text(encoding="utf-8"))["step"]) if file.exists() else None
