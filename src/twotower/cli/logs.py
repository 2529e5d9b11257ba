"""Other places that a run's numbers go to: TensorBoard, Weights & Biases."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from twotower.training.trainer import StepReport

TensorBoardOption = Annotated[
    bool,
    typer.Option("--tensorboard/--no-tensorboard", help="Also write OUT/tensorboard; needs the package tensorboard."),
]
WandbOption = Annotated[
    str | None,
    typer.Option("--wandb", metavar="PROJECT", help="Also log to this W&B project; needs the package wandb."),
]


@contextmanager
def logging_to(
    out: Path, *, tensorboard: bool, wandb: str | None, settings: dict[str, Any]
) -> Iterator[Callable[[StepReport], None]]:
    """What takes each step's numbers there. Raises ValueError where a package is missing."""
    writer = _writer(out / "tensorboard") if tensorboard else None
    run = _run(wandb, out, settings) if wandb else None

    def log(done: StepReport) -> None:
        numbers = {k: v for k, v in done._asdict().items() if isinstance(v, int | float) and k != "step"}
        numbers |= {f"held_out_{name}": value for name, value in (done.held_out or {}).items()}
        if writer is not None:
            for name, value in numbers.items():
                writer.add_scalar(f"train/{name}", value, done.step)
        if run is not None:
            run.log(numbers, step=done.step)

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()
        if run is not None:
            run.finish()


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ValueError(f"--tensorboard needs a package ({error}); pip install tensorboard") from error
    return SummaryWriter(folder)


def _run(project: str, out: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(f"--wandb needs a package ({error}); pip install wandb") from error
    # The folder's name finds the run again, so that a resumed run goes on in the same curves
    return wandb.init(project=project, id=out.resolve().name, resume="allow", dir=out, config=settings)
