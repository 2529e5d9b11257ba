"""Where places lie in their blocks and documents. Letters: b batch, v views, t tokens, n blocks of a row, s places of a
block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.training.forward.layout import Layout
from twotower.training.masks.noise import Corrupted


class ByBlock(NamedTuple):
    """Values of positions, sorted by block: `cell` (r, t) is each position's among `num_blocks` · `size`."""

    cell: Tensor
    num_blocks: int
    size: int

    def spread(self, values: Tensor, rest: bool | float) -> Tensor:
        """Values (r, t) as (r, n, s), with `rest` where a block has no such place."""
        shape = (len(values), self.num_blocks * self.size)
        return values.new_full(shape, rest).scatter(1, self.cell, values).unflatten(1, (-1, self.size))

    def over(self, chosen: Tensor) -> Tensor:
        """(r, t): how many places of each position's block are chosen (r, t) bool."""
        return self.gather(self.spread(chosen, False).sum(-1, keepdim=True).expand(-1, -1, self.size))

    def gather(self, values: Tensor) -> Tensor:
        """The values (r, t) that `spread` made (r, n, s) of."""
        return values.flatten(1).gather(1, self.cell)


def by_block(layout: Layout, rows: int) -> ByBlock:
    """The places of a layout's blocks, for `rows` rows: a multiple of the layout's, whose views are stacked."""
    size = int((layout.block_end - layout.block_start).max())
    place = torch.arange(layout.block.shape[1], device=layout.block.device) - layout.block_start
    cell = (layout.block * size + place).repeat(rows // len(layout.block), 1)
    return ByBlock(cell, int(layout.block.max()) + 1, size)


def known_behind(noisy: Corrupted) -> Tensor:
    """(v·b, t) bool: whether a place has a known one behind it in its block."""
    known = (~noisy.masked).long()
    so_far = known.cumsum(1)
    last = (noisy.layout.block_end - 1).repeat(len(known) // len(noisy.layout.block), 1)
    return so_far.gather(1, last) > so_far


def after_end(x0: Tensor, layout: Layout, scored: Tensor, eos_token_ids: tuple[int, ...]) -> Tensor:
    """(b, t) bool: whether a place is behind a scored end token of its document."""
    ends = (torch.isin(x0, torch.tensor(eos_token_ids, dtype=x0.dtype, device=x0.device)) & scored).long()
    before = ends.cumsum(1) - ends
    return before > before.gather(1, layout.document_start.expand_as(x0))
