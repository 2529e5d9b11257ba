"""Absorbing noise on blocks. Letters: b batch, t tokens, n blocks."""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_LEVEL = 1e-3


class Corrupted(NamedTuple):
    """xt (b, t) with masks, `masked` (b, t) bool, `level` (b, t) each position's t̂, `block` (t,) block indices."""

    xt: Tensor
    masked: Tensor
    level: Tensor
    block: Tensor


def corrupt(
    x0: Tensor,
    scored: Tensor,
    *,
    block_size: int,
    mask_token_id: int,
    full_mask_fraction: float,
    generator: torch.Generator,
) -> Corrupted:
    """Masks each scored position of x0 (b, t) with its block's own probability t̂ (linear schedule).

    t̂ ~ U[1e-3, 1] per block by low-discrepancy draws (one stratum per block of the batch), or 1 for a
    `full_mask_fraction` of blocks: the state that every block is decoded from first. The block grid starts at a
    random offset, so the first and last block may be short. Positions outside `scored` (b, t) bool, such as prompts,
    are never masked.
    """
    b, t = x0.shape
    offset = int(torch.randint(block_size, (1,), generator=generator))
    block = (torch.arange(t) + offset) // block_size  # (t,)
    n = int(block[-1]) + 1
    strata = (torch.arange(b * n) + torch.rand(b * n, generator=generator)) / (b * n)
    levels = MIN_LEVEL + (1 - MIN_LEVEL) * strata[torch.randperm(b * n, generator=generator)]
    full = torch.rand(b * n, generator=generator) < full_mask_fraction
    level = levels.masked_fill(full, 1.0).view(b, n)[:, block]  # (b, t)
    masked = (torch.rand(b, t, generator=generator) < level) & scored
    # A bf16 model multiplies t̂ by 1000 in bf16 (812.5 becomes 812); the fast sinusoids tell the two apart, so a
    # denoiser that is to work in either dtype sees both.
    rounded = (level.bfloat16() * 1000).to(level.dtype) / 1000
    coin = torch.rand(b * n, generator=generator).view(b, n)[:, block] < 0.5
    level = torch.where(coin, rounded, level)
    return Corrupted(x0.masked_fill(masked, mask_token_id), masked, level, block)
