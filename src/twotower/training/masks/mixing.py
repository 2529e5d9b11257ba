"""Kinds of masks in shares: which of them each block gets, and its later state.

Letters: b batch, v views, t tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.training.config import Share
from twotower.training.masks.drafting import drafting, prefix
from twotower.training.masks.noise import MIN_LEVEL, Corrupted, generator_of, rounded_for_some
from twotower.training.masks.places import by_block
from twotower.training.masks.trajectory import passes_made


class _Drawn(NamedTuple):
    """Uniform numbers (b, t), the same in all of a block but for `place`: they choose a block's kind, its state of that
    kind, the share of its masks that stay in the later state and, by `place`, which, and whether to round the level."""

    kind: Tensor
    state: Tensor
    stays: Tensor
    rounds: Tensor
    place: Tensor


def with_states(
    noisy: Corrupted,
    x0: Tensor,
    samples: Tensor,
    *,
    seed: int,
    shares: Sequence[Share],
    mask_token_id: int,
    later: bool,
    known_from: Callable[[], Tensor],
) -> Corrupted:
    """The rows x0 (b, t) with each block masked as one of the kinds in `shares`, drawn in proportion to their weights;
    as `noise` it stays what it is in `noisy`, which has one view. With `later` a second view is a later state of each
    block: the next one of a trajectory, else each mask stays with a chance that is drawn per block.

    What is drawn depends on (seed, the row's number in `samples` (b,)) alone. `known_from` gives the order of
    `trajectory.known_from`, and is called only where trajectories are among the kinds. But for noise, the model is told
    which share of a block's scored places is masked, as in decoding.
    """
    layout, scored = noisy.layout, noisy.scored
    places = by_block(layout, len(x0))
    drawn = _draw(samples, layout.block, seed)
    in_block = places.spread(scored, False).long()
    rank = places.gather(in_block.cumsum(-1)) - 1
    count = places.over(scored)
    ends = torch.tensor([share.weight for share in shares], dtype=torch.float64).cumsum(0)
    chosen = torch.bucketize(drawn.kind * ends[-1], ends[:-1], right=True)  # (b, t): each block's kind
    stays = drawn.place < drawn.stays
    masked, after = noisy.masked, noisy.masked & stays
    level, told = noisy.level, noisy.told
    for kind, share in enumerate(shares):
        if share.name == "noise":
            continue
        if share.name == "trajectory":
            known = known_from()
            made = passes_made(known, drawn.state, places)
            own, following = known > made, known > made + 1
        else:
            own = scored & (drafting(rank) if share.name == "drafting" else prefix(rank, count, drawn.state))
            following = own & stays
        ours, fraction = chosen == kind, _fraction(places.over(own), count)
        masked, after = torch.where(ours, own, masked), torch.where(ours, following, after)
        level = torch.where(ours, fraction, level)
        told = torch.where(ours, rounded_for_some(fraction, drawn.rounds < 0.5), told)
    if later:
        fraction = _fraction(places.over(after), count)
        masked, level = torch.cat((masked, after)), torch.cat((level, fraction))
        told = torch.cat((told, rounded_for_some(fraction, drawn.rounds < 0.5)))
    xt = x0.repeat(len(masked) // len(x0), 1).masked_fill(masked, mask_token_id)
    return Corrupted(xt, masked, level, told, scored, layout)


def _fraction(masked: Tensor, count: Tensor) -> Tensor:
    """The level of blocks with `masked` of `count` scored places masked; noise knows none below MIN_LEVEL."""
    return (masked / count.clamp(min=1)).clamp(min=MIN_LEVEL)


def _draw(samples: Tensor, block: Tensor, seed: int) -> _Drawn:
    rows = []
    for sample, own in zip(samples.tolist(), block, strict=True):
        generator = generator_of(seed, sample, 1)
        # In float64: a number just below 1 must not be rounded to it
        per_block = torch.rand(4, int(own[-1]) + 1, generator=generator, dtype=torch.float64)[:, own]
        rows.append(torch.cat((per_block, torch.rand(1, len(own), generator=generator, dtype=torch.float64))))
    return _Drawn(*torch.stack(rows, dim=1))
