"""Stopping a training run by a signal: the first saves, the second ends at once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console

from twotower.signals import STDERR, end_at_once, on_signals
from twotower.training.run.trainer import Trainer

# Signals within this time count as one: `timeout` and some supervisors send theirs to a process and to its group.
_ONE_SIGNAL_SECONDS = 0.5


class StopRequest:
    """Remembers the first signal that comes, and ends the process at once by the second."""

    def __init__(self, *, tells: bool) -> None:
        self.number: int | None = None
        self._tells = tells
        self._came = 0.0

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Handles a signal."""
        now = time.monotonic()
        if self.number is not None and now - self._came > _ONE_SIGNAL_SECONDS:
            end_at_once(number)
        if self.number is None:
            self.number, self._came = number, now
            if self._tells:  # not by print, in which the signal may have come
                name = signal.Signals(number).name
                os.write(STDERR, f"{name}: stopping after this step; a second signal ends at once\n".encode())

    def is_there(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None


@contextmanager
def stop_request(trainer: Trainer) -> Iterator[StopRequest]:
    """A context in which SIGINT, SIGTERM and SIGHUP are requests to stop; rank 0 says that one came."""
    request = StopRequest(tells=trainer.ranks.rank == 0)
    with on_signals(request):
        yield request


def end_if_stopped(trainer: Trainer, request: StopRequest, *, is_done: bool) -> None:
    """Ends the command with 128 + the signal's number, as shells do, where the trainer's run was stopped, and says what
    is saved. `is_done` is what the run returned."""
    if is_done and request.number is None:
        return
    # Another rank may have got the signal.
    number = signal.Signals(signal.SIGTERM if request.number is None else request.number)
    if trainer.ranks.rank == 0:
        if trainer.step == 0:
            saved = "before the first step: nothing is to be saved"
        else:
            where = trainer.checkpoints.place(trainer.step)
            then = "writes the checkpoint" if is_done else "goes on from there"
            saved = (
                f"after step {trainer.step} of {trainer.config.steps}: its state is {where}; the same command {then}"
            )
        Console(stderr=True).print(f"stopped by {number.name} {saved}", soft_wrap=True, highlight=False)
    raise typer.Exit(128 + number)
