"""Where a measurement comes from: its command, commit and machine."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from twotower.model.two_tower import TwoTower

_PACKAGE = Path(__file__).parents[1]


def provenance(model: TwoTower) -> dict[str, Any]:
    """What is published with every measurement.

    `commit` is None unless the package is in its git checkout. `machine` includes the number of PyTorch's threads.
    """
    return {
        "command": command(),
        "commit": commit(),
        "machine": machine(model),
        "torch": torch.__version__,
        "dtype": str(model.context_tower.embeddings.dtype).removeprefix("torch."),
    }


def command() -> str:
    """A command that runs this process again: `twotower …`, `python -m MODULE …` or `python FILE …`."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:  # started by python -m; for a package that runs its __main__
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif sys.argv[0].endswith(".py"):
        start = ["python", sys.argv[0]]
    else:
        start = [Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


def machine(model: TwoTower) -> dict[str, Any]:
    """The processor's name, the number of threads used, and the GPU's name if the model is on one."""
    found: dict[str, Any] = {"cpu": cpu_model(), "threads": torch.get_num_threads()}
    if model.context_device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(model.context_device)
    return found


def commit() -> str | None:
    """The commit of the checkout, with "-dirty" after it if files were changed; None outside of a checkout."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top) / "src" / "twotower" != _PACKAGE:
        return None  # an installed package, which may lie inside another project's checkout
    return _git("describe", "--always", "--dirty")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    """The processor's name, or its architecture if the system does not say more."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
