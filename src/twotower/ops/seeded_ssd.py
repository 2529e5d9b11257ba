"""Mamba-2's scan in training: one pass over the context and over every block seeded with it.

Letters: b batch, r rows of the layout (b or 1), c chunks, q places of a chunk, h heads, p head width, g groups, n state
width. All inputs lie in chunks (`ops.chunks`), are float32 or wider, and have dt = 0 where a place holds no token.

Let a = dt·A per token, c its running sum over a document within a chunk, u its running sum over a block, and s the sum
over the context tokens of the chunk that precede the block. With H the context tower's state before the chunk, j over
context tokens of earlier blocks in the chunk, and k over the block's own tokens up to i:

    y_i = Σ_k exp(u_i − u_k) (C_i·B_k) dt_k x_k  +  Σ_j exp(u_i + s − c_j) (C_i·B'_j) dt'_j x'_j
        + exp(u_i + s) C_i·H + D x_i

(primes: the context tower's). Only one state per chunk exists, however short the blocks are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.chunks import Chunks


class ChunkInputs(NamedTuple):
    """What one layer's scan reads: x (b, c, q, h, p), dt (b, c, q, h), B and C (b, c, q, g, n)."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


def chunk_states(inputs: ChunkInputs, A: Tensor, chunks: Chunks) -> Tensor:
    """The state before each chunk, (b, c, h, p, n); zeros before a row's first. A (h,).

    H_next = exp(c_last)·H + Σ_j exp(c_last − c_j)·dt_j·x_j ⊗ B_j over the document that the chunk ends in; H is dropped
    where that document began inside the chunk.
    """
    x, dt, B, _ = inputs
    b, c, q, h, p = x.shape
    g, n = B.shape[3:]
    total = _sums(chunks.causal, dt * A)  # (b, c, q, h)
    last = total[:, :, -1]
    left = (last.unsqueeze(2) - total).masked_fill(~chunks.stays.unsqueeze(-1), -torch.inf).exp()
    scaled = (x * (left * dt).unsqueeze(-1)).view(b, c, q, g, -1)
    added = torch.einsum("bcqgm,bcqgn->bcgmn", scaled, B).reshape(b, c, h, p, n)
    kept = last.exp() * chunks.continues[:, :, -1:]  # (b, c, h)
    state = torch.zeros_like(added[:, 0])
    states = [state]
    for piece, factor in zip(added.unbind(1)[:-1], kept.unbind(1)[:-1], strict=True):
        state = torch.addcmul(piece, state, factor[..., None, None])
        states.append(state)
    return torch.stack(states, dim=1)


def context_output(inputs: ChunkInputs, A: Tensor, D: Tensor, states: Tensor, chunks: Chunks) -> Tensor:
    """The context tower's own causal outputs (b, c, q, h, p) from its `states`; A, D (h,)."""
    x, dt, B, C = inputs
    total = _sums(chunks.causal, dt * A)  # (b, c, q, h)
    y = _attended(C, B, x * dt.unsqueeze(-1), total, total, chunks.causal)
    return _with_state(y, C, states, total, chunks) + x * D[:, None]


def seeded_output(
    inputs: ChunkInputs, A: Tensor, D: Tensor, context: ChunkInputs, context_A: Tensor, states: Tensor, chunks: Chunks
) -> Tensor:
    """Every block's outputs (b, c, q, h, p), each from the context's state at its own start.

    `context` (its C is not read), `context_A` (h,) and `states` are the context tower's of this layer; A, D (h,) the
    denoiser's. Gradients reach all of them.
    """
    x, dt, B, C = inputs
    own = _sums(chunks.own, dt * A)  # (b, c, q, h)
    context_a = context.dt * context_A
    # Sums over exactly what a place sees, not differences of longer sums: other blocks' tokens don't even round it.
    since_chunk = own + _sums(chunks.past, context_a)
    y = _attended(C, B, x * dt.unsqueeze(-1), own, own, chunks.own)
    total = _sums(chunks.causal, context_a)
    past = context.x * context.dt.unsqueeze(-1)
    y = y + _attended(C, context.B, past, since_chunk, total, chunks.past)
    return _with_state(y, C, states, since_chunk, chunks) + x * D[:, None]


def _sums(visible: Tensor, a: Tensor) -> Tensor:
    """Σ_j visible_ij·a_j: visible (r, c, q, q) bool, a (b, c, q, h)."""
    return visible.to(a.dtype) @ a


def _attended(C: Tensor, B: Tensor, x: Tensor, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Σ_j exp(query_i − key_j)·(C_i·B_j)·x_j over visible j: (b, c, q, h, p); query and key (b, c, q, h)."""
    b, c, q, h, _ = x.shape
    g = B.shape[3]
    difference = query.transpose(2, 3).unsqueeze(-1) - key.transpose(2, 3).unsqueeze(-2)  # (b, c, h, q, q)
    # before exp, which may overflow where it is not visible
    decay = difference.masked_fill_(~visible.unsqueeze(2), -torch.inf).exp_()
    products = C.transpose(2, 3) @ B.permute(0, 1, 3, 4, 2)  # (b, c, g, q, q)
    weights = (decay.view(b, c, g, h // g, q, q) * products.unsqueeze(3)).view(b, c, h, q, q)
    return (weights @ x.transpose(2, 3)).transpose(2, 3)


def _with_state(y: Tensor, C: Tensor, states: Tensor, decay: Tensor, chunks: Chunks) -> Tensor:
    """y (b, c, q, h, p) plus exp(decay_i)·C_i·H where the document began before the chunk."""
    b, c, q, h, p = y.shape
    g, n = C.shape[3:]
    rows = C.transpose(2, 3) @ states.view(b, c, g, -1, n).transpose(-1, -2)  # (b, c, g, q, h/g·p)
    seeded = rows.view(b, c, g, q, -1, p).transpose(2, 3).reshape(b, c, q, h, p)
    factor = decay.exp() * chunks.continues.unsqueeze(-1)
    return torch.addcmul(y, seeded, factor.unsqueeze(-1))
