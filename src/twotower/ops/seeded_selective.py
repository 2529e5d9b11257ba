"""The selective scan in training: one pass over the context and over every block seeded with it.

Letters and the layout in chunks as in `ops.seeded_ssd`, of which g chunks are worked on at a time; m channels, n state
width. Inputs are those of `ops.selective_scan` and are masked where a place holds no token. The context tower's states
after every token of a chunk are made one after the other, from the state before the chunk. A block starts from the one
before its first token and goes on, with the denoiser's inputs and A:

    h_block = h' after the last token before the block, in its document; else 0
    h_i = exp(dt_i·A)·h_{i-1} + u_i·B_i,   y_i = h_i·C_i + skip_i

Of the context one state per chunk is kept; the states of single tokens live while their chunks are worked on.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.chunks import Chunks
from twotower.ops.selective_scan import SelectiveInputs, selective_output, selective_states


class Reach(NamedTuple):
    """What the scan needs to know of `Chunks`: `fresh` (r, c, q), a place holds the first token of its document;
    `seen` (r, c, k), the number of the chunk's places before a block up to the last that it sees, 0 where it sees none;
    `continues` (r, c, k), the block's document began before the chunk."""

    fresh: Tensor
    seen: Tensor
    continues: Tensor

    @classmethod
    def of(cls, chunks: Chunks) -> "Reach":
        fresh = torch.ones_like(chunks.filled)
        fresh[:, :, 1:] = ~chunks.causal.diagonal(-1, -2, -1)
        fresh[:, :, 0] = ~chunks.continues[:, :, 0]
        place = torch.arange(1, fresh.shape[-1] + 1, device=fresh.device)
        return cls(fresh, (chunks.before * place).amax(-1), chunks.block_continues)


def chunk_ends(inputs: SelectiveInputs, A: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """What g chunks (b, g, q, …) do to the state before each: they add the first result and multiply by the second,
    both (b, g, m, n)."""
    b, g = inputs.u.shape[:2]
    state = inputs.u.new_zeros(b * g, *A.shape)
    added = selective_states(_flat(inputs), A, state, fresh.flatten(0, 1))[:, -1]
    kept = (inputs.dt.sum(2).unsqueeze(-1) * A).exp().masked_fill(fresh.any(-1)[..., None, None], 0.0)
    return added.view(b, g, *A.shape), kept


def context_output(inputs: SelectiveInputs, A: Tensor, states: Tensor, fresh: Tensor) -> Tensor:
    """The context tower's own outputs (b, g, q, m), from its `states` before each chunk (b, g, m, n)."""
    own = _flat(inputs)
    after = selective_states(own, A, states.flatten(0, 1), fresh.flatten(0, 1))
    return selective_output(after, own).view_as(inputs.u)


def seeded_output(
    inputs: SelectiveInputs, A: Tensor, context: SelectiveInputs, context_A: Tensor, states: Tensor, reach: Reach
) -> Tensor:
    """Every block's outputs (b, g, k, s, m), each from the context's state at its own start.

    `context` (its C and skip are not read), `context_A` (m, n) and `states` are the context tower's of this layer.
    Gradients reach all of them.
    """
    b, g, k, s, m = inputs.u.shape
    first = states.flatten(0, 1)  # (b·g, m, n)
    after = selective_states(_flat(context), context_A, first, reach.fresh.flatten(0, 1))  # (b·g, q, m, n)
    seen = reach.seen.flatten(0, 1)  # (b·g, k)
    chunk = torch.arange(b * g, device=seen.device).unsqueeze(1)
    none = (first.unsqueeze(1) * reach.continues.flatten(0, 1)[..., None, None]).expand(-1, k, -1, -1)
    seeds = torch.where((seen == 0)[..., None, None], none, after[chunk, (seen - 1).clamp(min=0)])
    own = _flat(SelectiveInputs(*(part.flatten(1, 2) for part in inputs)))  # (b·g·k, s, …)
    return selective_output(selective_states(own, A, seeds.flatten(0, 1), None), own).view(b, g, k, s, m)


def _flat(inputs: SelectiveInputs) -> SelectiveInputs:
    """(b, g, …) as (b·g, …)."""
    return SelectiveInputs(*(part.flatten(0, 1) for part in inputs))
