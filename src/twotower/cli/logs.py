"""Logs a training run's numbers to TensorBoard and to Weights & Biases."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twotower.training.run.checkpointing import latest_state, read_progress
from twotower.training.run.trainer import StepReport


@contextmanager
def logging_to(
    out: Path, *, tensorboard: bool, wandb: str | None, settings: dict[str, Any]
) -> Iterator[Callable[[StepReport], None]]:
    """Yields a function that logs a step's report to those that are asked for. A resumed run goes on after its saved
    state. Raises ValueError where a package is missing."""
    writer = _writer(out) if tensorboard else None
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


def _writer(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ValueError(f"--tensorboard needs a package ({error}); pip install 'twotower[log]'") from error
    state = latest_state(out)
    done = 0 if state is None else read_progress(state)["step"]
    # A killed run may have logged steps after its saved state; they are run again and would be shown twice.
    return SummaryWriter(out / "tensorboard", purge_step=done + 1)


def _run(project: str, out: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(f"--wandb needs a package ({error}); pip install wandb") from error
    return wandb.init(project=project, id=_run_id(out), resume="allow", dir=out, config=settings)


def _run_id(out: Path) -> str:
    """The run's id, kept in its folder: a resumed run continues its curves, a run in another folder begins new ones."""
    file = out / "wandb-run-id"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{out.resolve().name}-{secrets.token_hex(4)}")
    return file.read_text()
