"""Masks of the states that decoding goes through (the pseudo-trajectories of d3LLM).

The denoiser decodes all blocks of the rows at once, by confidence at a threshold, as mode `diffusion` does: in each
pass a block's surest place becomes known, and so do all places surer than γ. Each known place holds the text's own
token, not the proposed one, so that the text stays the answer to every state: the decoding gives the order alone. A
block is trained at one of the states of its order, each with equal chance; so a wholly masked block comes as often as
decoding meets it.

Letters: b batch, t tokens, m masked positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from twotower.model.two_tower import TwoTower
from twotower.training.forward.block_parallel import Hidden
from twotower.training.forward.layout import Layout
from twotower.training.masks.places import ByBlock, by_block

# The number of hidden states whose logits are in memory at once.
_HEAD_ROWS = 1024


@torch.no_grad()
def known_from(
    model: TwoTower,
    x0: Tensor,
    scored: Tensor,
    layout: Layout,
    *,
    passes: int,
    threshold: float,
    towers: Callable[..., Hidden],
) -> Tensor:
    """(b, t) int64: after how many passes each scored place of x0 (b, t) is known, `passes` + 1 for one that isn't
    known by then; 0 for places that are not scored.

    Every call makes `passes` passes, whatever becomes known, because sharded ranks must make equally many.
    """
    places = by_block(layout, len(x0))
    every = places.over(scored).clamp(min=1)
    found = torch.where(scored, passes + 1, 0)
    for number in range(1, passes + 1):
        masked = found >= number
        level = places.over(masked) / every
        xt = x0.masked_fill(masked, model.config.mask_token_id)
        hidden = towers(model, x0, xt, level, layout).denoiser[masked]
        sure = torch.zeros(x0.shape, device=x0.device).masked_scatter(masked, _confidence(model, hidden))
        best = places.gather(places.spread(sure, 0.0).amax(-1, keepdim=True).expand(-1, -1, places.size))
        found = torch.where(masked & ((sure > threshold) | (sure == best)), number, found)
    return found


def _confidence(model: TwoTower, hidden: Tensor) -> Tensor:
    """(m,): the probability of the likeliest token of hidden states (m, d)."""
    parts = [model.lm_head(part).softmax(-1).amax(-1).float() for part in hidden.split(_HEAD_ROWS)]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def passes_made(known: Tensor, drawn: Tensor, places: ByBlock) -> Tensor:
    """(b, t): how many passes each block has had: a number after which it still has masks, each with equal chance.
    `known` is `known_from`'s, and `drawn` (b, t) uniform on [0, 1), the same in all of a block. Places are masked where
    `known` is larger."""
    last = places.spread(known, 0).amax(-1, keepdim=True).expand(-1, -1, places.size)
    return (drawn * places.gather(last)).long()
