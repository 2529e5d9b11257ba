"""What a step of any mode takes and gives. Letters: b rows.

A step has three parts, so that one wait for the devices can serve many steps. A mode's `launch` gives the devices their
work and waits for nothing, `read` waits for any number of launched steps at once, and each one's `finish` makes tokens
of its results. Nothing between launch and finish reads a tensor's values on the host: every such read would wait.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor

from twotower.decoding.output import BlockView, DraftCount, Token
from twotower.decoding.params import SamplingParams
from twotower.decoding.sampling import Temper
from twotower.model.state import ContextState, join
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device


class Request(NamedTuple):
    """A prompt's ids (at least one) with its settings, which are settled, and its `seed`.

    `produced` are tokens generated already, where the request restarts from a rebuilt context. `draft` is the length of
    the next draft of mode `verified`, which depends on how many tokens of earlier drafts were kept; the first draft is
    a block of the usual size. `prompt_logprobs` asks an engine for the log-probabilities of the prompt's own
    tokens under the context tower, and of so many likeliest ones at each place; None asks for none.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    produced: tuple[int, ...] = ()
    draft: int = 16
    prompt_logprobs: int | None = None

    @property
    def max_new_tokens(self) -> int:
        """The most tokens that the request writes."""
        assert self.params.max_new_tokens is not None
        return self.params.max_new_tokens

    @property
    def planned_length(self) -> int:
        """The most tokens of prompt and answer together."""
        return len(self.prompt_ids) + self.max_new_tokens

    @property
    def block_size(self) -> int:
        """The tokens that it fills together, or of its longest draft."""
        assert self.params.block_size is not None
        return self.params.block_size

    @property
    def temperature(self) -> float:
        """The temperature, 0 for greedy."""
        assert self.params.temperature is not None
        return self.params.temperature


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """The rows of one mode's batch between two steps.

    Each mode adds fields. A field is a tuple or tensor with an entry per row (an empty tuple where no row has one yet),
    the same number for all rows, None, or a value that selects and joins rows itself.
    """

    requests: tuple[Request, ...]
    context: ContextState
    settings: Temper

    @property
    def rests(self) -> tuple[bool, ...]:
        """Whether each row is between two blocks, so that it may go on in another mode."""
        return (True,) * len(self.requests)

    @property
    def joins(self) -> bool:
        """Whether the batch can be joined with another; any can after a step."""
        return True

    def select(self, rows: list[int]) -> Self:
        """The batch with these rows alone."""
        return select_rows(self, rows)

    def join(self, others: Self) -> Self:
        """This batch with the rows of another behind its own; keys of both must lie in pages of one pool."""
        assert self.joins
        assert others.joins
        return join_rows(self, others)

    def view(self, row: int) -> BlockView | None:
        """The row's block after the last step; None in modes that fill no blocks."""
        return None


D = TypeVar("D")


def select_rows(value: D, rows: list[int]) -> D:
    """A dataclass of per-row values with these rows alone; see `RowBatch` for what its fields may be."""
    fields = {f.name: _select(getattr(value, f.name), rows) for f in dataclasses.fields(cast(Any, value))}
    return cast(D, dataclasses.replace(cast(Any, value), **fields))


def _select(value: Any, rows: list[int]) -> Any:
    if value is None or isinstance(value, int) or (isinstance(value, tuple) and not value):
        return value
    if isinstance(value, Tensor):
        return value[to_device(rows, value.device)]
    return value.select(rows) if hasattr(value, "select") else tuple(value[r] for r in rows)


def join_rows(ours: D, theirs: D) -> D:
    """A dataclass of per-row values with the rows of another behind its own."""
    pairs = {f.name: (getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(cast(Any, ours))}
    return cast(D, dataclasses.replace(cast(Any, ours), **{name: _join(*pair) for name, pair in pairs.items()}))


def _join(ours: Any, theirs: Any) -> Any:
    if ours is None or isinstance(ours, int):
        return ours
    if isinstance(ours, Tensor):
        return torch.cat((ours, theirs))
    if isinstance(ours, ContextState):
        return join((ours, theirs))
    return ours.join(theirs) if hasattr(ours, "join") else ours + theirs


R = TypeVar("R", bound=RowBatch)


class BatchStep(NamedTuple):
    """The batch after one step, the tokens each row got, which towers ran for each row, and what its draft gave, where
    the mode drafts."""

    rows: RowBatch
    tokens: tuple[tuple[Token, ...], ...]
    denoiser_calls: tuple[int, ...]
    context_calls: tuple[int, ...]
    drafts: tuple[DraftCount | None, ...] = ()


class LaunchedStep(Protocol):
    """A step whose work the devices have been given."""

    @property
    def results(self) -> Tensor:
        """The numbers that `finish` needs, float64, which holds any id and any float32 exactly."""
        ...

    def finish(self, values: list[Any]) -> BatchStep:
        """The batch after the step and its tokens, given `results` as nested lists; waits for nothing."""
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
