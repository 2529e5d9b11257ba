"""The gated delta rule in training: one pass over the context and over every block seeded with it.

Letters and the layout in chunks as in `ops.seeded_ssd`; inputs are those of `ops.delta` and are masked where a place
holds no token. The context's corrections w' depend on the state before them, so chunks follow one another; one state
per chunk is kept. With them the state before a block, e and c as in `ops.seeded_ssd`, is linear in what is kept:

    H_block = exp(e)·H + Σ_j exp(e − c_j)·w'_j ⊗ k'_j

It is never made: keys and queries of the block read it as sums over the chunk's places, so memory is that of the
products of s places of a block with q of a chunk per head, whatever the number of blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.chunks import Chunks
from twotower.ops.delta import DeltaInputs, per_head, solve
from twotower.ops.seeded_ssd import across, decay, from_state, sums, within


class DeltaStates(NamedTuple):
    """The context tower's corrections w (b, c, q, h, p) and the states before each chunk (b, c, h, p, n)."""

    w: Tensor
    states: Tensor


def context_corrections(inputs: DeltaInputs, chunks: Chunks) -> DeltaStates:
    """The context tower's side of every chunk; the state is dropped where a document begins."""
    h = inputs.v.shape[3]
    k = per_head(inputs.k, h).transpose(2, 3)  # (b, c, h, q, n)
    total = sums(chunks.causal, inputs.a).transpose(2, 3)  # (b, c, h, q)
    visible = chunks.causal.unsqueeze(2)
    products = decay(total.unsqueeze(-1) - total.unsqueeze(-2), visible) * (k @ k.transpose(-1, -2))
    first = decay(total, chunks.continues.unsqueeze(2)).unsqueeze(-1)
    left = decay(total[..., -1:] - total, chunks.stays.unsqueeze(2)).unsqueeze(-1)
    kept = decay(total[..., -1], chunks.continues[:, :, -1:])  # (b, c, h)
    v, beta = inputs.v.transpose(2, 3), inputs.beta.transpose(2, 3).unsqueeze(-1)
    state = v.new_zeros(*v.shape[:1], h, v.shape[-1], k.shape[-1])
    found, states = [], []
    for i in range(v.shape[1]):
        states.append(state)
        w = solve(products[:, i], v[:, i] - first[:, i] * (k[:, i] @ state.transpose(-1, -2)), beta[:, i])
        found.append(w.transpose(1, 2))
        added = (left[:, i] * w).transpose(-1, -2) @ k[:, i]
        state = torch.addcmul(added, state, kept[:, i, :, None, None])
    return DeltaStates(torch.stack(found, dim=1), torch.stack(states, dim=1))


def context_output(inputs: DeltaInputs, context: DeltaStates, chunks: Chunks) -> Tensor:
    """The context tower's own causal outputs (b, c, q, h, p)."""
    total = sums(chunks.causal, inputs.a)  # (b, c, q, h)
    y = within(context.w, inputs.k, inputs.q, total, chunks.causal)
    factor = decay(total, chunks.continues.unsqueeze(-1)).unsqueeze(-1)
    return torch.addcmul(y, from_state(inputs.q, context.states), factor)


def seeded_output(inputs: DeltaInputs, given: DeltaInputs, context: DeltaStates, chunks: Chunks) -> Tensor:
    """Every block's outputs (b, c, k, s, h, p), each from the context's state at its own start; `given` and `context`
    are the context tower's of this layer. Gradients reach all of them."""
    b, c, blocks, s, h, p = inputs.v.shape
    own = inputs.a.cumsum(3)  # (b, c, k, s, h)
    total, before = sums(chunks.causal, given.a), sums(chunks.before, given.a)
    factor = decay(before, chunks.block_continues.unsqueeze(-1))[:, :, :, None, :, None]

    def read(rows: Tensor) -> Tensor:
        """exp(u_i)·H_block·row_i for rows (b, c, k, s, g, n)."""
        earlier = across(rows, given.k, context.w, total, before, chunks)
        state = from_state(rows.flatten(2, 3), context.states).view(b, c, blocks, s, h, p)
        return torch.addcmul(earlier, state, factor) * own.exp().unsqueeze(-1)

    causal = torch.ones(s, s, dtype=torch.bool, device=own.device).tril()
    k, sums_first = per_head(inputs.k, h).transpose(3, 4), own.transpose(3, 4)  # (b, c, k, h, s, …)
    products = decay(sums_first.unsqueeze(-1) - sums_first.unsqueeze(-2), causal) * (k @ k.transpose(-1, -2))
    wanted, beta = (inputs.v - read(inputs.k)).transpose(3, 4), inputs.beta.transpose(3, 4).unsqueeze(-1)
    w = solve(products, wanted, beta).transpose(3, 4)
    return within(w, inputs.k, inputs.q, own, causal) + read(inputs.q)
