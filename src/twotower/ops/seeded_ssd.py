"""Mamba-2's scan in training: one pass over the context and over every block seeded with it.

Letters: b batch, r rows of the layout (b or 1), c chunks, q places of a chunk, k blocks of a chunk, s places of a
block, h heads, p head width, g groups, n state width. Inputs lie in chunks (`ops.chunks`): the (…) of their shapes is
(b, c, q) in the context tower and (b, c, k, s) in the denoiser. They are float32 or wider and have dt = 0 where a place
holds no token.

Let a = dt·A per token, c its running sum over a document within a chunk, u its running sum over a block, and e the sum
over the context tokens of the chunk that precede the block. With H the context tower's state before the chunk, j over
context tokens of earlier blocks in the chunk, and l over the block's own tokens up to i:

    y_i = Σ_l exp(u_i − u_l) (C_i·B_l) dt_l x_l
        + exp(u_i) [Σ_j exp(e − c_j) (C_i·B'_j) dt'_j x'_j + exp(e) C_i·H] + D x_i

(primes: the context tower's). Only one state per chunk exists, however short the blocks are, and the decays between
context and block are one per block and context token.
"""

import torch
from torch import Tensor

from twotower.ops.chunks import Chunks
from twotower.ops.ssd import ScanInputs

# exp of less is 0: 1e-26 of a token's weight is beyond rounding, and denormal numbers are very slow on CPUs.
LEAST_EXPONENT = -60.0


def chunk_states(inputs: ScanInputs, A: Tensor, chunks: Chunks) -> Tensor:
    """The context tower's state before each chunk, (b, c, h, p, n); zeros before a row's first. A (h,).

    H_next = exp(c_last)·H + Σ_j exp(c_last − c_j)·dt_j·x_j ⊗ B_j over the document that the chunk ends in; H is dropped
    where that document began inside the chunk.
    """
    x, dt, B, _ = inputs
    b, c, q, h, p = x.shape
    g, n = B.shape[3:]
    total = sums(chunks.causal, dt * A)  # (b, c, q, h)
    last = total[:, :, -1]
    left = decay(last.unsqueeze(2) - total, chunks.stays.unsqueeze(-1))
    scaled = (x * (left * dt).unsqueeze(-1)).view(b, c, q, g, -1)
    added = torch.einsum("bcqgm,bcqgn->bcgmn", scaled, B).reshape(b, c, h, p, n)
    kept = decay(last, chunks.continues[:, :, -1:])  # (b, c, h)
    state = torch.zeros_like(added[:, 0])
    states = [state]
    for piece, factor in zip(added.unbind(1)[:-1], kept.unbind(1)[:-1], strict=True):
        state = torch.addcmul(piece, state, factor[..., None, None])
        states.append(state)
    return torch.stack(states, dim=1)


def context_output(inputs: ScanInputs, A: Tensor, D: Tensor, states: Tensor, chunks: Chunks) -> Tensor:
    """The context tower's own causal outputs (b, c, q, h, p) from its `states`; A, D (h,)."""
    x, dt, B, C = inputs
    total = sums(chunks.causal, dt * A)  # (b, c, q, h)
    y = within(x * dt.unsqueeze(-1), B, C, total, chunks.causal)
    factor = decay(total, chunks.continues.unsqueeze(-1)).unsqueeze(-1)
    return torch.addcmul(y, from_state(C, states), factor) + x * D[:, None]


def seeded_output(
    inputs: ScanInputs, A: Tensor, D: Tensor, context: ScanInputs, context_A: Tensor, states: Tensor, chunks: Chunks
) -> Tensor:
    """Every block's outputs (b, c, k, s, h, p), each from the context's state at its own start.

    `context` (its C is not read), `context_A` (h,) and `states` are the context tower's of this layer; A, D (h,) the
    denoiser's. Gradients reach all of them.
    """
    x, dt, B, C = inputs
    b, c, k, s, h, p = x.shape
    own = (dt * A).cumsum(3)  # (b, c, k, s, h)
    causal = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()
    y = within(x * dt.unsqueeze(-1), B, C, own, causal)
    context_a = context.dt * context_A
    total = sums(chunks.causal, context_a)  # (b, c, q, h)
    # A sum over exactly what a block sees, not a difference of longer ones: other tokens don't even round it
    before = sums(chunks.before, context_a)  # (b, c, k, h)
    seeded = across(C, context.B, context.x * context.dt.unsqueeze(-1), total, before, chunks)
    factor = decay(before, chunks.block_continues.unsqueeze(-1))[:, :, :, None, :, None]
    seeded = torch.addcmul(seeded, from_state(C.flatten(2, 3), states).view(b, c, k, s, h, p), factor)
    return torch.addcmul(y, seeded, own.exp().unsqueeze(-1)) + x * D[:, None]


def sums(visible: Tensor, a: Tensor) -> Tensor:
    """Σ_j visible_ij·a_j: visible (r, c, i, q) bool, a (b, c, q, h)."""
    return visible.to(a.dtype) @ a


def decay(exponent: Tensor, visible: Tensor) -> Tensor:
    """exp(exponent) where visible, else 0. Masked before exp, which may overflow elsewhere."""
    return exponent.masked_fill(~(visible & (exponent > LEAST_EXPONENT)), -torch.inf).exp()


def within(x: Tensor, B: Tensor, C: Tensor, total: Tensor, visible: Tensor) -> Tensor:
    """Σ_j exp(total_i − total_j)·(C_i·B_j)·x_j over visible j: x (…, s, h, p), B and C (…, s, g, n), total (…, s, h),
    visible (…, s, s)."""
    h, g = x.shape[-2], B.shape[-2]
    total = total.transpose(-1, -2)  # (…, h, s)
    decays = decay(total.unsqueeze(-1) - total.unsqueeze(-2), visible.unsqueeze(-3))  # (…, h, s, s)
    products = C.transpose(-2, -3) @ B.movedim(-3, -1)  # (…, g, s, s)
    weights = (decays.unflatten(-3, (g, h // g)) * products.unsqueeze(-3)).flatten(-4, -3)
    return (weights @ x.transpose(-2, -3)).transpose(-2, -3)


def across(C: Tensor, B: Tensor, x: Tensor, total: Tensor, before: Tensor, chunks: Chunks) -> Tensor:
    """Σ_j exp(before − total_j)·(C_i·B_j)·x_j over the chunk's earlier blocks: (b, c, k, s, h, p);
    C (b, c, k, s, g, n), the context's B (b, c, q, g, n) and x (b, c, q, h, p), total (b, c, q, h), before
    (b, c, k, h)."""
    b, c, k, s, g, _ = C.shape
    q, h, p = x.shape[2:]
    exponent = before.transpose(2, 3).unsqueeze(-1) - total.transpose(2, 3).unsqueeze(-2)  # (b, c, h, k, q)
    decays = decay(exponent, chunks.before.unsqueeze(2))
    products = C.flatten(2, 3).transpose(2, 3) @ B.movedim(2, -1)  # (b, c, g, k·s, q)
    weights = products.view(b, c, g, 1, k, s, q) * decays.view(b, c, g, h // g, k, 1, q)
    past = x.transpose(2, 3)  # (b, c, h, q, p)
    return (weights.view(b, c, h, k * s, q) @ past).view(b, c, h, k, s, p).movedim(2, -2)


def from_state(C: Tensor, states: Tensor) -> Tensor:
    """C_i·H: C (b, c, q, g, n), states (b, c, h, p, n), result (b, c, q, h, p)."""
    b, c, h, p, n = states.shape
    g, q = C.shape[3], C.shape[2]
    rows = C.transpose(2, 3) @ states.view(b, c, g, -1, n).transpose(-1, -2)  # (b, c, g, q, h/g·p)
    return rows.transpose(2, 3).reshape(b, c, q, h, p)
