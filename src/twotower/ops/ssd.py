"""Mamba-2's scan (state-space duality). Letters: b batch, s tokens, h heads, p head width, g groups, n state width.

Recurrence per head: H_t = exp(dt_t·A)·H_{t-1} + dt_t·x_t ⊗ B_t, y_t = H_t·C_t + D·x_t. Everything is float32 or
wider: a bf16 scan over a large seeded state overflows. A token with dt = 0 leaves the state as it was, which is how
padding and rejected tokens are skipped.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens per quadratic piece: the (s, s) products stay small and a piece holds any block length in use.
CHUNK = 64


class ScanInputs(NamedTuple):
    """What one layer's scan reads: x (…, h, p), dt (…, h), B and C (…, g, n). The dimensions (…) are (b, s) here."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


class ScanOutput(NamedTuple):
    """y (b, s, h, p) and the state after the last token (b, h, p, n)."""

    y: Tensor
    state: Tensor


def time_steps(dt: Tensor, dt_bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """softplus(dt + dt_bias) clamped to `limit`, from dt (b, s, h) and dt_bias (h,) to (b, s, h).

    Computed in dt_bias's dtype, float32 or wider.
    """
    steps = F.softplus(dt.to(dt_bias.dtype) + dt_bias)
    low, high = limit
    return steps.clamp(low, high) if low > 0 or high != float("inf") else steps


def ssd_scan(inputs: ScanInputs, A: Tensor, D: Tensor, state: Tensor) -> ScanOutput:
    """Outputs of all s tokens and the last state, from the initial `state` (b, h, p, n); A, D (h,)."""
    s = inputs.x.shape[1]
    if s == 1:
        return _step(inputs, A, D, state)
    pieces = []
    for start in range(0, s, CHUNK):
        piece = ScanInputs(*(v[:, start : start + CHUNK] for v in inputs))
        pieces.append(ssd_output(piece, A, D, state))
        state = ssd_state(piece, A, state)
    return ScanOutput(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), state)


def ssd_output(inputs: ScanInputs, A: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """y (b, s, h, p) of one piece, quadratic in s, without the state after it.

    y_i = Σ_{j≤i} exp(u_i − u_j)·(C_i·B_j)·dt_j·x_j + exp(u_i)·H·C_i + D·x_i with u the running sum of dt·A.
    """
    x, dt, B, C = inputs
    b, s, h, p = x.shape
    g, n = B.shape[2:]
    per_group = h // g
    u = (dt * A).cumsum(1).transpose(1, 2)  # (b, h, s)
    # tril before exp: above the diagonal u_i − u_j is positive and may overflow; after it: exp(0) there must go
    decay = (u.unsqueeze(-1) - u.unsqueeze(-2)).tril().exp().tril()  # (b, h, i, j)
    C_rows = C.transpose(1, 2)  # (b, g, s, n)
    products = C_rows @ B.permute(0, 2, 3, 1)  # (b, g, i, j)
    weights = decay.view(b, g, per_group, s, s) * products.unsqueeze(2)
    own = weights.view(b, h, s, s) @ (x * dt.unsqueeze(-1)).transpose(1, 2)  # (b, h, s, p)
    # H·C_i for all heads of a group in one product
    seeded = C_rows @ state.reshape(b, g, per_group * p, n).transpose(-1, -2)  # (b, g, s, h/g·p)
    seeded = seeded.view(b, g, s, per_group, p).transpose(2, 3).reshape(b, h, s, p)
    y = torch.addcmul(own, seeded, u.exp().unsqueeze(-1)).transpose(1, 2)  # (b, s, h, p)
    return torch.addcmul(y, x, D[:, None])


def ssd_state(inputs: ScanInputs, A: Tensor, state: Tensor, counts: Tensor | None = None) -> Tensor:
    """The state (b, h, p, n) after all tokens, or the first counts[b] (b,) int64 of each row:
    exp(u_s)·H + Σ_j exp(u_s − u_j)·dt_j·x_j ⊗ B_j."""
    x, dt, B, _ = inputs
    b, s, h, p = x.shape
    if counts is not None:
        dt = dt * (torch.arange(s, device=dt.device) < counts[:, None]).unsqueeze(-1)
    g, n = B.shape[2:]
    u = (dt * A).cumsum(1)  # (b, s, h)
    scaled = x * ((u[:, -1:] - u).exp() * dt).unsqueeze(-1)  # (b, s, h, p)
    rows = scaled.view(b, s, g, -1).permute(0, 2, 3, 1)  # (b, g, h/g·p, s)
    added = (rows @ B.transpose(1, 2)).view(b, h, p, n)
    return torch.addcmul(added, state, u[:, -1].exp()[..., None, None])


def _step(inputs: ScanInputs, A: Tensor, D: Tensor, state: Tensor) -> ScanOutput:
    x, dt, B, C = (v[:, 0] for v in inputs)  # (b, h, p), (b, h), (b, g, n), (b, g, n)
    b, h, p = x.shape
    g, n = B.shape[1:]
    added = ((x * dt.unsqueeze(-1)).view(b, g, -1, 1) * B.unsqueeze(2)).view(b, h, p, n)
    state = torch.addcmul(added, state, (dt * A).exp()[..., None, None])
    y = (state.view(b, g, -1, n) @ C.unsqueeze(-1)).view(b, h, p)
    return ScanOutput(torch.addcmul(y, x, D[:, None]).unsqueeze(1), state)
