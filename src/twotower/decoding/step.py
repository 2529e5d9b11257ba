"""What a step of any mode takes and gives. Letters: b rows.

Each mode's `launch` gives the devices a step's work and waits for nothing; `read` then waits for any number of steps at
once, and each one's `finish` makes tokens of what came. Values on the host in between would be waits of their own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from twotower.decoding.output import BlockView, Token
from twotower.decoding.params import SamplingParams
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower


class Request(NamedTuple):
    """A prompt's ids (at least one) with its settings; `seed` is settled.

    `produced` are new tokens that it has already, where it goes on with a context state that was made anew. `draft` is
    the length of the next draft of mode `verified`, which depends on what became of those before; the first is long
    enough for a short answer to need one round.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    produced: tuple[int, ...] = ()
    draft: int = 8


class Rows(Protocol):
    """A batch between two steps of one mode."""

    @property
    def requests(self) -> tuple[Request, ...]: ...

    @property
    def context(self) -> ContextState: ...

    @property
    def rests(self) -> tuple[bool, ...]:
        """Whether each row is between two blocks, so that it may go on in another mode."""
        ...

    @property
    def joins(self) -> bool:
        """Whether the batch can be joined with another; any can after a step."""
        ...

    def select(self, rows: list[int]) -> Self:
        """The batch without the rows that are done."""
        ...

    def join(self, others: Self) -> Self:
        """This batch with the rows of another behind its own; both say that they join, and keys lie in one pool."""
        ...

    def view(self, row: int) -> BlockView | None:
        """The row's block as the last step left it, None in modes without one."""
        ...


R = TypeVar("R", bound=Rows)


class BatchStep(NamedTuple):
    """The batch after one step, the tokens each row got, and which towers ran for each row."""

    rows: Rows
    tokens: tuple[tuple[Token, ...], ...]
    denoiser_calls: tuple[int, ...]
    context_calls: tuple[int, ...]


class LaunchedStep(Protocol):
    """A step whose work the devices have been given."""

    @property
    def results(self) -> Tensor:
        """What the host must know of it, float64, which holds any id and any float32 exactly."""
        ...

    def finish(self, values: list[Any]) -> BatchStep:
        """What came of the step, given its `results` as nested lists; may launch more, and waits for nothing."""
        ...


def read(launched: Sequence[LaunchedStep]) -> list[list[Any]]:
    """Every step's results as nested lists: one wait for the devices, however many steps and devices there are."""
    device = launched[0].results.device
    flat = [one.results.flatten().to(device, non_blocking=True) for one in launched]
    values: list[float] = torch.cat(flat).tolist()
    nested, start = [], 0
    for one in launched:
        end = start + one.results.numel()
        nested.append(_nest(values[start:end], one.results.shape))
        start = end
    return nested


def _nest(values: list[Any], shape: Sequence[int]) -> list[Any]:
    """A flat list in the shape of a tensor."""
    for size in reversed(shape[1:]):
        values = [values[i : i + size] for i in range(0, len(values), size)]
    return values


class ModeSteps(Protocol[R]):
    """The functions of a mode's module."""

    def context_ids(self, request: Request) -> tuple[int, ...]:
        """What the context tower must have absorbed before the request takes its first step."""
        ...

    def start(self, model: TwoTower, requests: tuple[Request, ...], context: ContextState) -> R:
        """The batch before its first step; `context` has absorbed each request's `context_ids`."""
        ...

    def launch(self, model: TwoTower, rows: R) -> LaunchedStep:
        """Gives the devices the work of one step, and waits for nothing."""
        ...


def step(steps: ModeSteps[R], model: TwoTower, rows: R) -> BatchStep:
    """One step of a mode's batch, launched, waited for and finished."""
    launched = steps.launch(model, rows)
    [values] = read([launched])
    return launched.finish(values)
