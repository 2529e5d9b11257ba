"""Root-mean-square norms. Letters: d width, g groups."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (…, d) / sqrt(mean(x²) + eps) · weight (d,), computed in at least float32, returned as `dtype`."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.linalg.vecdot(wide, wide).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return (wide * scale).mul_(weight).to(dtype) if not wide.requires_grad else (wide * scale * weight).to(dtype)


def gated_group_rms_norm(y: Tensor, z: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """Mamba-2's output norm: y · silu(z), then an RMS norm over each of g groups of channels; all (…, d).

    Gate first, norm second (the other order is another model). Computed in at least float32.
    """
    gated = y * torch.nn.functional.silu(z.to(y.dtype))
    grouped = gated.unflatten(-1, (num_groups, -1))  # (…, g, d/g)
    scale = torch.rsqrt(torch.linalg.vecdot(grouped, grouped) / grouped.shape[-1] + eps).unsqueeze(-1)
    return (grouped * scale).flatten(-2) * weight
