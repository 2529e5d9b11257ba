"""Masks of the states that drafting meets, and of early places known.

`drafting` is what `verified` asks of a denoiser in every round but the first: the newest token is known, all places
after it are masked. `prefix` has any number of a block's first places known, as blocks are mostly decoded from left to
right. Uniform noise hardly ever makes either: of a block of 16, the first with chance 1/16² or less.

Letters: r rows, t tokens.
"""

from torch import Tensor


def drafting(rank: Tensor) -> Tensor:
    """(r, t) bool: all of a block's places masked but the first. `rank` (r, t) numbers the scored places of a block."""
    return rank >= 1


def prefix(rank: Tensor, count: Tensor, drawn: Tensor) -> Tensor:
    """(r, t) bool: the places from the k-th on, with k uniform among 0 … count − 1. `count` (r, t) is the number of
    scored places of the block, and `drawn` (r, t) uniform on [0, 1), the same in all of a block."""
    return rank >= (drawn * count).long()
