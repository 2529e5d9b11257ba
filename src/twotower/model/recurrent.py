"""What the towers ask of a recurrent mixer, and what its kinds have in common. Letters: b batch, s tokens, d width,
w conv kernel, c channels, h heads, p head width, n state width."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from twotower.model.state import MambaState
from twotower.ops.conv import next_past
from twotower.ops.ssd import ScanOutput

# The characters of a config's pattern that stand for recurrent mixers
RECURRENT_KINDS = "MGSR"


class Scanned(NamedTuple):
    """The mixer's output (b, s, d), the recurrent state after all tokens, and the states at the marks."""

    mixed: Tensor
    end: Tensor
    marked: tuple[MambaState, ...]


class Recurrent(Protocol):
    """`Mamba2`, `DeltaNet` or `SelectiveMixer`. What `prepare` gives is the mixer's own."""

    def initial_state(self, batch_size: int) -> MambaState: ...

    def prepare(self, x: Tensor, past: Tensor) -> Any:
        """What the other methods read, for x (b, s, d) after the conv rows `past` (b, w-1, c)."""
        ...

    def outputs(self, inputs: Any, state: MambaState, dtype: torch.dtype) -> Tensor:
        """(b, s, d) for all tokens of a block, from the state before it."""
        ...

    def scan(self, inputs: Any, state: MambaState, marks: tuple[int, ...], dtype: torch.dtype) -> Scanned:
        """The output, the state after the last token, and the states after `marks` tokens, ascending and in [0, s]."""
        ...

    def advance(self, inputs: Any, state: MambaState, counts: Tensor | None, end: Tensor | None) -> MambaState:
        """The state after the first counts[b] tokens of each row, or all."""
        ...


def scan_to_marks(
    scan: Callable[[slice, Tensor], ScanOutput], rows: Tensor, state: MambaState, marks: tuple[int, ...]
) -> tuple[Tensor, Tensor, tuple[MambaState, ...]]:
    """A scan's y over all tokens, the recurrent state after them, and the states after `marks` tokens, from `state`.

    `rows` (b, s, c) are what is convolved. `scan` is called with a slice of the tokens and the recurrent state before
    it, once for each stretch between marks that holds a token.
    """
    ssm, pieces, marked = state.ssm, [], []
    for first, last in itertools.pairwise((0, *marks, rows.shape[1])):
        if last > first:
            y, ssm = scan(slice(first, last), ssm)
            pieces.append(y)
        marked.append(MambaState(next_past(rows[:, :last], state.conv, None), ssm))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), ssm, tuple(marked[:-1])
