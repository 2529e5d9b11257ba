"""`twotower` with its arguments, whose server fails on demand, as it does where memory runs out.

After SIGUSR1 the context tower's next pass raises torch.OutOfMemoryError, after SIGUSR2 the denoiser's next pass.
"""

import collections
import signal
from collections.abc import Callable
from typing import Any

import torch

from twotower.cli.main import app
from twotower.model.two_tower import TwoTower

due = collections.Counter[str]()  # passes to fail, by the method's name


def failing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        if due[name]:
            due[name] -= 1
            raise torch.OutOfMemoryError(f"injected into {name}: tried to allocate 20.00 GiB")
        return method(*given, **named)

    return run


for number, name in ((signal.SIGUSR1, "score"), (signal.SIGUSR2, "denoiser_logits")):
    setattr(TwoTower, name, failing(name, getattr(TwoTower, name)))
    signal.signal(number, lambda *_, name=name: due.update([name]))

app()
