"""What the towers ask of a recurrent mixer. Letters: b batch, s tokens, d width, w conv kernel, c channels."""

from typing import Any, Protocol

import torch
from torch import Tensor

from twotower.model.mamba2 import Scanned
from twotower.model.state import MambaState

# The characters of a config's pattern that stand for recurrent mixers
RECURRENT_KINDS = "MG"


class Recurrent(Protocol):
    """`Mamba2` or `DeltaNet`. What `prepare` gives is the mixer's own."""

    def initial_state(self, batch_size: int) -> MambaState: ...

    def prepare(self, x: Tensor, past: Tensor) -> Any:
        """What the other methods read, for x (b, s, d) after the conv rows `past` (b, w-1, c)."""
        ...

    def outputs(self, inputs: Any, state: MambaState, dtype: torch.dtype) -> Tensor:
        """(b, s, d) for all tokens of a block, from the state before it."""
        ...

    def scan(self, inputs: Any, state: MambaState, marks: tuple[int, ...], dtype: torch.dtype) -> Scanned: ...

    def advance(self, inputs: Any, state: MambaState, counts: Tensor | None, end: Tensor | None) -> MambaState:
        """The state after the first counts[b] tokens of each row, or all."""
        ...
