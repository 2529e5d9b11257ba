"""The causal convolution of the training pass. Letters: b batch, r rows of the layout (b or 1), t tokens, c channels,
w kernel width."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Reach(NamedTuple):
    """Which of the w-1 rows before each token a tap reads: `own` from the same stream, `past` from the context's.

    Both (w-1, r, t) bool, entry δ-1 for the row δ places earlier; where neither holds the row is zero.
    """

    own: Tensor
    past: Tensor


def make_reach(first: Tensor, own: Tensor, width: int) -> Reach:
    """Reach of a kernel of `width` taps where token i's stream starts at own_i and its document at first_i (r, t)."""
    token = torch.arange(own.shape[1], device=own.device)
    rows = torch.stack([token - back for back in range(1, width)]) if width > 1 else token.new_zeros(0, token.numel())
    rows = rows.unsqueeze(1)  # (w-1, 1, t)
    return Reach(rows >= own, (rows >= first) & (rows < own))


def seeded_conv(x: Tensor, context: Tensor | None, reach: Reach, taps: Tensor, bias: Tensor | None) -> Tensor:
    """y_i = bias + Σ_δ taps[w-1-δ] · row_{i-δ}, the rows of x (b, t, c) preceded by those of `context` (b, t, c).

    taps (w, c), bias (c,) or None; returns (b, t, c). Each block's first tokens thus see the context tower's last w-1
    rows before it. `context` None is a stream without one: the context tower's own.
    """
    t, width = x.shape[1], taps.shape[0]
    zero = x.new_zeros(())
    rows = F.pad(x, (0, 0, width - 1, 0))  # (b, w-1+t, c)
    past = None if context is None else F.pad(context, (0, 0, width - 1, 0))
    y = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
    for back in range(1, width):
        piece = slice(width - 1 - back, width - 1 - back + t)
        other = zero
        if past is not None:
            other = torch.where(reach.past[back - 1].unsqueeze(-1), past[:, piece], zero)
        seen = torch.where(reach.own[back - 1].unsqueeze(-1), rows[:, piece], other)
        y = torch.addcmul(y, seen, taps[-1 - back])
    return y
