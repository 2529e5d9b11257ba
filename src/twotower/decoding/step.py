"""What every mode's `step` takes and gives. Letters: b rows."""

from typing import NamedTuple, Protocol, Self

from twotower.decoding.params import SamplingParams
from twotower.model.state import ContextState


class Request(NamedTuple):
    """A prompt's ids (at least one) with its settings; `seed` is settled.

    `produced` are new tokens that it has already, where it goes on with a context state that was made anew.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    produced: tuple[int, ...] = ()


class Token(NamedTuple):
    """One committed token: its id, the denoising step it was committed at, the probability it had."""

    id: int
    step: int
    confidence: float


class BlockView(NamedTuple):
    """One row's block after a denoising step: ids with masks, and the probability of each fixed token.

    `step` is the number of steps the block has seen, `t` the fraction of it that is still masked.
    """

    ids: tuple[int, ...]
    confidences: tuple[float, ...]
    step: int
    t: float


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

    def select(self, rows: list[int]) -> Self:
        """The batch without the rows that are done."""
        ...

    def join(self, others: Self) -> Self:
        """This batch with the rows of another behind its own; both have seen a step, and keys lie in one pool."""
        ...

    def view(self, row: int) -> BlockView | None:
        """The row's block as the last step left it, None in modes without one."""
        ...


class Stepped(NamedTuple):
    """The batch after one step, the tokens each row got, and which towers ran for each row."""

    rows: Rows
    tokens: tuple[tuple[Token, ...], ...]
    denoiser_calls: tuple[int, ...]
    context_calls: tuple[int, ...]
