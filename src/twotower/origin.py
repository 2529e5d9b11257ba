"""Where a result comes from: the command that made it, the commit of the code, and the processor."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path

_PACKAGE = Path(__file__).parent


def command() -> str:
    """A command that runs this process again: `twotower …`, `python -m MODULE …` or `python FILE …`; of
    `python -c CODE …` the system doesn't keep CODE."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:  # started by python -m; for a package that runs its __main__
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif sys.argv[0].endswith(".py") or sys.argv[0] == "-c":
        start = ["python", sys.argv[0]]
    else:
        start = [Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


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
