"""Depthwise causal convolution. Letters: b batch, s tokens, c channels, w kernel width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_silu(x: Tensor, past: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of `causal_conv`, as every Mamba-2 layer has it: (b, s, c)."""
    return F.silu(causal_conv(x, past, taps, bias))


def causal_conv(x: Tensor, past: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """y_t = bias + Σ_j taps[j] · x_{t-w+1+j} over the rows of x (b, s, c) preceded by `past` (b, w-1, c).

    taps (w, c), bias (c,) or None; returns (b, s, c). Written as w multiply-adds, because oneDNN compiles a convolution
    anew for each s and is slower at block lengths.
    """
    s, width = x.shape[1], taps.shape[0]
    rows = torch.cat((past, x), dim=1)  # (b, w-1+s, c)
    y = rows[:, :s] * taps[0] if bias is None else torch.addcmul(bias, rows[:, :s], taps[0])
    for j in range(1, width):
        y = torch.addcmul(y, rows[:, j : j + s], taps[j])
    return y


def next_past(x: Tensor, past: Tensor, counts: Tensor | None) -> Tensor:
    """The last w-1 rows of [past | first counts[b] rows of x] for each batch row: (b, w-1, c).

    counts (b,) int64, or None when all rows of x count.
    """
    rows = torch.cat((past, x), dim=1)
    width = past.shape[1]
    if counts is None:
        return rows[:, rows.shape[1] - width :].contiguous()
    index = counts[:, None] + torch.arange(width, device=x.device)  # (b, w-1)
    return rows.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
