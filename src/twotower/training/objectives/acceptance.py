"""The loss `acceptance`: how much of a draft `verified` will keep.

    −log( (1/n) Σ_k Π_{j≤k} q(x0_j) )        of the n masked places of a block, from left to right

A draft is kept up to its first wrong token (Leviathan et al. 2023), so Σ_k Π_{j≤k} q(x0_j) is the expected number of
tokens kept of a draft drawn from q, where x0 is what the context tower would write. Its gradient weighs each place by
the expected number of tokens kept from there on: places behind one that is still wrong count little (D-PACE, arXiv
2605.18810; "Teaching Diffusion to Speculate Left-to-Right", arXiv 2606.11552). The logarithm keeps the first place's
weight at 1 while drafts are still bad.

Only blocks whose masked places are their last ones are drafts; others add 0. Places behind a text's end don't count.
Letters: b batch, v views, t tokens, n blocks of a row, s places of a block.
"""

import torch
from torch import Tensor

from twotower.training.masks.noise import Corrupted
from twotower.training.masks.places import after_end, by_block, known_behind


def acceptance(log_right: Tensor, x0: Tensor, noisy: Corrupted, eos_token_ids: tuple[int, ...]) -> Tensor:
    """(v·b, t): the loss of each draft at its first place, 0 elsewhere. `log_right` (v·b, t) is log q(x0) at masked
    places."""
    views = len(noisy.masked) // len(x0)
    ended = after_end(x0, noisy.layout, noisy.scored, eos_token_ids).repeat(views, 1)
    counted, gaps = noisy.masked & ~ended, noisy.masked & known_behind(noisy)
    places = by_block(noisy.layout, len(log_right))
    drafted, broken = places.spread(counted, False), places.spread(gaps, False).any(-1)  # (v·b, n, s), (v·b, n)
    drafted = drafted & ~broken[..., None]
    kept = places.spread(log_right, 0.0).masked_fill(~drafted, 0.0).cumsum(-1)  # log Π over the places so far
    kept = kept.masked_fill(~drafted, -torch.inf)
    number = drafted.sum(-1)
    there = number > 0
    mean = kept.masked_fill(~there[..., None], 0.0).logsumexp(-1) - number.clamp(min=1).log()
    first = drafted & (drafted.cumsum(-1) == 1)
    return places.gather(torch.where(first & there[..., None], -mean[..., None], 0.0))
