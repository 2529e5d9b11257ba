"""Options that several sub-commands share, and opening a model as they ask."""

import os
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from twotower.checkpoints.hf import SHIPPED, resolve
from twotower.checkpoints.load import DEFAULT_CHECKPOINT, load
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower

Dtype = Literal["float32", "bfloat16"]

_MODEL = f"Checkpoint directory, Hugging Face id, or the name of one that comes with the package: {', '.join(SHIPPED)}."
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="PATH", help=_MODEL, show_default=DEFAULT_CHECKPOINT.name)
]
ModelArgument = Annotated[str | None, typer.Argument(help=_MODEL, show_default=DEFAULT_CHECKPOINT.name)]
DeviceOption = Annotated[str, typer.Option("--device", help="Where both towers run: cpu, cuda, cuda:N or mps.")]
ContextDeviceOption = Annotated[
    str | None, typer.Option("--context-device", help="Where the context tower runs.", show_default="--device")
]
DenoiserDeviceOption = Annotated[
    str | None, typer.Option("--denoiser-device", help="Where the denoiser tower runs.", show_default="--device")
]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Type of the weights in memory.", show_default="the checkpoint's")
]


def open_model(
    path: str | Path | None,
    *,
    device: str = "cpu",
    dtype: Dtype | None = None,
    context_device: str | None = None,
    denoiser_device: str | None = None,
    pack: bool = True,
) -> TwoTower:
    """`load` with option values, and a progress bar on stderr where that is a terminal. Raises ValueError for a device
    that isn't there."""
    console = Console(stderr=True)
    columns = (TextColumn("Loading"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        return load(
            path,
            device=open_device(device),
            dtype=dtype,
            context_device=None if context_device is None else open_device(context_device),
            denoiser_device=None if denoiser_device is None else open_device(denoiser_device),
            pack=pack,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def open_device(name: str) -> torch.device:
    """The device of that name. Raises SettingError for one that this machine and this build of torch don't have."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError("device", name, "cpu, cuda, cuda:N or mps") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        found = ", ".join(f"{count} {kind}" for kind, count in there.items())
        raise SettingError("device", name, "a device of this machine and this build of torch", f"they have {found}")
    return device


def own_folder(model: str, name: str) -> Path:
    """The folder of a checkpoint, for a command that writes the file `name` into it. Raises PermissionError for one
    that comes with the package, which every program here shares, unless its path was given, and where it may not be
    written."""
    folder = resolve(model)
    if model in SHIPPED and not Path(model).is_dir():
        raise PermissionError(
            f"{model} is a checkpoint that comes with the package, in which {name} would be written; copy it first, as "
            f"with: cp -r {folder} my-{model}"
        )
    file = folder / name
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise PermissionError(f"{file} may not be written; copy the checkpoint to where you may write")
    return folder


def check_out(out: Path) -> None:
    """Raises NotADirectoryError where a file is in the place of the directory `out`, or of one above it."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, and {out} must be a directory; choose another")
