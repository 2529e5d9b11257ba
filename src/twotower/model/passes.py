"""What a pass of a tower reads and gives, whoever runs it. Letters: b batch, s tokens, d width, m `M` layers."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from twotower.model.pages import Past
from twotower.model.state import ContextState, MambaState
from twotower.ops.rope import Positioning
from twotower.ops.transfer import to_device


class PassInputs(NamedTuple):
    """Embedded tokens and what they come after.

    `x` (b, s, d) is the residual stream before the first layer. `state` holds the recurrent states and each row's
    number of earlier tokens; `past` are its cached keys and values, of which row b may see the first
    state.lengths[b] places. `positioning` has what the s tokens' positions do in each of the config's
    `attention_kinds`. `places` (b·s,) int64 says where a causal pass writes new keys among all places of the pages;
    None where keys are not in pages (row b's then go behind its first state.lengths[b]) and in a block pass, which
    writes none.
    """

    x: Tensor
    state: ContextState
    past: Past
    positioning: tuple[Positioning, ...]
    places: Tensor | None


class CausalPass(NamedTuple):
    """The context tower over s tokens, before it is decided how many of them stay.

    hidden (b, s, d) after the last norm; `state` is the one before the tokens, whose key buffer already holds them.
    `advance` gives the recurrent states, one per `M` layer, after each row's first counts[b] (b,) int64 tokens, or all
    of them for None; `marks` has those after each of the numbers of tokens that were asked for.
    """

    hidden: Tensor
    state: ContextState
    advance: Callable[[Tensor | None], tuple[MambaState, ...]]
    marks: dict[int, tuple[MambaState, ...]]

    def commit(self, counts: tuple[int, ...], next_logits: Tensor | None) -> ContextState:
        """The state after the first counts[b] of the tokens of each row; the others are dropped.

        Keys are truncated; a recurrent state can't be, so it is replayed from the state before the tokens. Changes
        nothing that another state still reads. A pass can be committed once.
        """
        state = self.state
        lengths = tuple(n + c for n, c in zip(state.lengths, counts, strict=True))
        whole = min(counts) == self.hidden.shape[1]
        mamba = self.advance(None if whole else to_device(counts, self.hidden.device))
        assert state.buffer.tip is None, "this pass was committed before"
        state.buffer.tip = lengths
        return ContextState(lengths, mamba, state.buffer, next_logits, state.rope_lengths)
