"""Where a figure comes from: the command, the commit, the machine."""

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
    """What every published figure is published with; `commit` is None where the package isn't in its git checkout.

    The threads that PyTorch runs on are in `machine`.
    """
    return {
        "command": command(),
        "commit": commit(),
        "machine": machine(model),
        "torch": torch.__version__,
        "dtype": str(model.context_tower.embeddings.dtype).removeprefix("torch."),
    }


def command() -> str:
    """What runs this process again: `twotower …`, `python -m MODULE …` or `python FILE …`."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:  # of python -m; a package runs its __main__
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif sys.argv[0].endswith(".py"):
        start = ["python", sys.argv[0]]
    else:
        start = [Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


def machine(model: TwoTower) -> dict[str, Any]:
    """The processor's name and the threads used of it; the GPU's name where the model is on one."""
    found: dict[str, Any] = {"cpu": cpu_model(), "threads": torch.get_num_threads()}
    if model.context_device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(model.context_device)
    return found


def commit() -> str | None:
    """The checkout's commit, with "-dirty" after it where files were changed."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top) / "src" / "twotower" != _PACKAGE:
        return None  # installed, perhaps below another project's checkout
    return _git("describe", "--always", "--dirty")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
