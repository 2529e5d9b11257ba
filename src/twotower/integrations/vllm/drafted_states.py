"""Recurrent layers over tokens that vLLM verifies, on CPUs, whose vLLM build forgets how many were kept.

Letters: b rows, t tokens of all rows, c channels, w width of the convolution, l places of a row's entry in the cache,
h heads, p head width, g groups, n state width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve_drafts_(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    slots: Tensor,
    num_accepted: Tensor,
    starts: Tensor,
) -> Tensor:
    """silu of the causal convolution of x (t, c), whose rows begin at starts (b + 1), with weight (c, w): (t, c).

    `state` (entries, c, l) has at the row's entry, slots (b,), what the last pass convolved, from its second place on;
    `num_accepted` (b,) of that pass's tokens were kept, so that the w − 1 places from the one of that number on stand
    before x. They are replaced by what this pass convolves. Entry 0 is of rows that don't count.
    """
    out = torch.zeros_like(x)
    before = weight.shape[1] - 1
    rows = zip(slots.tolist(), num_accepted.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    for slot, accepted, start, end in rows:
        if slot == 0 or start == end:
            continue
        first = max(accepted, 1) - 1
        entered = torch.cat((state[slot, :, first : first + before], x[start:end].t().to(state.dtype)), dim=1)
        mixed = F.conv1d(entered[None].to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])
        out[start:end] = F.silu(mixed[0].to(x.dtype)).t()
        state[slot, :, : entered.shape[1] - 1] = entered[:, 1:]
    return out


def scan_drafts_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    slots: Tensor,
    num_accepted: Tensor,
    starts: Tensor,
    out: Tensor,
) -> None:
    """Mamba-2's recurrence H ← exp(dt·a)·H + dt·x ⊗ b, out = H·c + d·x over x (t, h, p), whose rows begin at
    starts (b + 1), into `out` (t, h, p). Step sizes dt (t, h) are positive, a and d (h,), b and c (t, g, n).

    `slots` (b, at least a row's tokens) are a row's entries in state (entries, h, p, n): that of the token before it is
    the one of the last token that was kept, and the state after each token goes to the entry of its number.
    """
    h, g = x.shape[1], b.shape[1]
    decay = torch.exp(dt * a)[..., None, None]  # (t, h, 1, 1)
    b, c = (table.float().repeat_interleave(h // g, dim=1) for table in (b, c))  # (t, h, n)
    entered = (dt[..., None] * x.float())[..., None] * b[:, :, None]  # (t, h, p, n)
    rows = zip(slots.tolist(), num_accepted.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    for own, accepted, start, end in rows:
        if own[0] == 0 or start == end:
            continue
        now = state[own[max(accepted, 1) - 1]].float()
        for place, token in enumerate(range(start, end)):
            now = decay[token] * now + entered[token]
            state[own[place]] = now
            out[token] = (now @ c[token, :, :, None])[..., 0] + d[:, None] * x[token]
