"""The gated delta rule (arXiv 2412.06464). Letters: b batch, s tokens, h heads, p value width, g key heads,
n key width.

Recurrence per head, with a decay exp(a_t) and a step size β_t:

    H_t = exp(a_t)·H_{t-1} + w_t ⊗ k_t,   w_t = β_t·(v_t − exp(a_t)·H_{t-1}·k_t),   y_t = H_t·q_t

What is written is the value less what the state holds under the key already. Everything is float32 or wider. A token
with a = 0 and β = 0 leaves the state as it was, which is how padding and rejected tokens are skipped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.ssd import CHUNK, ScanOutput

# Below the root when keys and queries are given length 1, as in the models' own code
EPSILON = 1e-6


class DeltaInputs(NamedTuple):
    """What one layer's scan reads: values v (…, h, p), the decays' logarithms a (…, h), step sizes β (…, h), keys k and
    queries q (…, g, n), one for h/g heads. The dimensions (…) are (b, s) here."""

    v: Tensor
    a: Tensor
    beta: Tensor
    k: Tensor
    q: Tensor

    def masked(self, kept: Tensor) -> "DeltaInputs":
        """Without the tokens where kept (…) is False: they leave the state as it was."""
        return self._replace(a=self.a * kept.unsqueeze(-1), beta=self.beta * kept.unsqueeze(-1))


def unit(x: Tensor) -> Tensor:
    """x (…, n) / sqrt(Σx² + ε)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


def delta_scan(inputs: DeltaInputs, state: Tensor) -> ScanOutput:
    """Outputs (b, s, h, p) of all s tokens and the last state, from the initial `state` (b, h, p, n)."""
    pieces = []
    for start in range(0, inputs.v.shape[1], CHUNK):
        y, state = _piece(DeltaInputs(*(v[:, start : start + CHUNK] for v in inputs)), state)
        pieces.append(y)
    return ScanOutput(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), state)


def delta_state(inputs: DeltaInputs, state: Tensor, counts: Tensor | None) -> Tensor:
    """The state (b, h, p, n) after all tokens, or the first counts[b] (b,) int64 of each row."""
    if counts is not None:
        inputs = inputs.masked(torch.arange(inputs.v.shape[1], device=counts.device) < counts[:, None])
    return delta_scan(inputs, state).state


def _piece(inputs: DeltaInputs, state: Tensor) -> ScanOutput:
    """One piece at once. With u the running sum of a, the w_i solve a triangular system:

    w_i + β_i Σ_{j<i} exp(u_i − u_j)·(k_i·k_j)·w_j = β_i·(v_i − exp(u_i)·H·k_i)
    y_i = exp(u_i)·H·q_i + Σ_{j≤i} exp(u_i − u_j)·(q_i·k_j)·w_j
    H_s = exp(u_s)·H + Σ_j exp(u_s − u_j)·w_j ⊗ k_j
    """
    h = inputs.v.shape[2]
    k, q = (per_head(v, h).transpose(1, 2) for v in (inputs.k, inputs.q))  # (b, h, s, n)
    v, beta = inputs.v.transpose(1, 2), inputs.beta.transpose(1, 2).unsqueeze(-1)  # (b, h, s, p), (b, h, s, 1)
    u = inputs.a.cumsum(1).transpose(1, 2)  # (b, h, s)
    # tril before exp: above the diagonal u_i − u_j is positive and may overflow; after it: exp(0) there must go
    decay = (u.unsqueeze(-1) - u.unsqueeze(-2)).tril().exp().tril()  # (b, h, i, j)
    first = u.exp().unsqueeze(-1)
    keys = k.transpose(-1, -2)
    from_state = state.transpose(-1, -2)  # (b, h, n, p)
    w = solve(decay * (k @ keys), v - first * (k @ from_state), beta)
    y = first * (q @ from_state) + (decay * (q @ keys)) @ w
    last = (u[..., -1:] - u).exp().unsqueeze(-1)
    end = torch.addcmul((last * w).transpose(-1, -2) @ k, state, u[..., -1].exp()[..., None, None])
    return ScanOutput(y.transpose(1, 2), end)


def per_head(x: Tensor, num_heads: int) -> Tensor:
    """Keys or queries (…, g, n) repeated for their heads: (…, h, n)."""
    return x.repeat_interleave(num_heads // x.shape[-2], dim=-2)


def solve(products: Tensor, wanted: Tensor, beta: Tensor) -> Tensor:
    """The w (…, s, p) with w_i + β_i·Σ_{j<i} products_ij·w_j = β_i·wanted_i: products (…, s, s), of which the lower
    triangle is read, wanted (…, s, p), beta (…, s, 1)."""
    return torch.linalg.solve_triangular(beta * products, beta * wanted, upper=False, unitriangular=True)
