"""Root-mean-square norms. Letters: d width, g groups."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (…, d) / sqrt(mean(x²) + eps) · weight (d,), computed in at least float32, returned as `dtype`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps).to(dtype)


def modulated_rms_norm(
    x: Tensor, weight: Tensor, eps: float, shift: Tensor, scale: Tensor, *, norm_first: bool, dtype: torch.dtype
) -> Tensor:
    """`rms_norm` of x (b, s, d) and the modulation x·(1 + scale) + shift, before it or (`norm_first`) after it.

    shift, scale (b, 1 or s, d). Returns (b, s, d) as `dtype`.
    """
    if norm_first:
        normed = rms_norm(x, weight, eps, dtype)
        return torch.addcmul(normed + shift, normed, scale)
    return rms_norm(torch.addcmul(x + shift, x, scale), weight, eps, dtype)


def gated_group_rms_norm(y: Tensor, z: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """Mamba-2's output norm: y · silu(z), then an RMS norm over each of g groups of channels; all (…, d).

    Gate first, norm second (the other order is another model). Computed in y's dtype, at least float32.
    """
    gated = y * F.silu(z.to(y.dtype))
    grouped = gated.unflatten(-1, (num_groups, -1))  # (…, g, d/g)
    return F.rms_norm(grouped, grouped.shape[-1:], None, eps).flatten(-2) * weight


def residual_sum(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + y, or x + y · gate; x and y (b, s, d), gate (b, 1 or s, d)."""
    return x + y if gate is None else torch.addcmul(x, y, gate)
