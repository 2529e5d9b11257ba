"""Root-mean-square norms. Letters: d width, g groups."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (…, d) / sqrt(mean(x²) + eps) · weight (d,), computed in at least float32, returned as `dtype`. A weight (h, d)
    has a row for each of the heads in x (…, h, d)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight.ndim == 2:
        return (F.rms_norm(wide, wide.shape[-1:], None, eps) * weight.to(wide.dtype)).to(dtype)
    return F.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps).to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """(x − mean(x)) / sqrt(var(x) + eps) · weight + bias for x (…, d), computed in at least float32, as `dtype`. A
    weight (h, d) has a row for each of the heads in x (…, h, d)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = F.layer_norm(wide, wide.shape[-1:], eps=eps) * weight.to(wide.dtype)
    return (normed if bias is None else normed + bias.to(wide.dtype)).to(dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift for x (b, s, d); shift, scale (b, 1 or s, d)."""
    return torch.addcmul(x + shift, x, scale)


def gated_group_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor | None,
    num_groups: int,
    eps: float,
    *,
    norm_first: bool = False,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The output norm of recurrent mixers: y · silu(z), then an RMS norm over each of g groups of channels; all (…, d).

    With `norm_first` the norm is of y alone and the gate multiplies what comes out of it, which is another model. A
    weight of None leaves only the gate. Computed in y's dtype, at least float32. Where each device has an equal part of
    a group's channels, `mean` makes of the mean squares (…, g, 1) of each the mean of all.
    """
    gate = F.silu(z.to(y.dtype))
    if weight is None:
        return y * gate
    grouped = (y if norm_first else y * gate).unflatten(-1, (num_groups, -1))  # (…, g, d/g)
    if mean is None:
        grouped = F.rms_norm(grouped, grouped.shape[-1:], None, eps)
    else:
        grouped = grouped * torch.rsqrt(mean(grouped.square().mean(-1, keepdim=True)) + eps)
    normed = grouped.flatten(-2) * weight
    return normed * gate if norm_first else normed


def residual_sum(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + y, or x + y · gate; x and y (b, s, d), gate (b, 1 or s, d)."""
    return x + y if gate is None else torch.addcmul(x, y, gate)
