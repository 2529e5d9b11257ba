"""Where blocks and documents lie in a training batch. Letters: r rows (b, or 1 where all agree), t tokens."""

import dataclasses
import functools

import torch
from torch import Tensor

from twotower.ops import seeded_conv, tiled_attention
from twotower.ops.chunks import Chunks, make_chunks


@dataclasses.dataclass(frozen=True)
class Layout:
    """`block` and `document` (r, t) int64: the index of each position's block and document, non-decreasing along a row.

    A document starts a new block, and nothing passes from one document to the next; padding is a document that is
    never scored.
    """

    block: Tensor
    document: Tensor

    def __post_init__(self) -> None:
        if self.block.ndim != 2 or self.block.shape != self.document.shape:
            shapes = f"{tuple(self.block.shape)} and {tuple(self.document.shape)}"
            raise ValueError(f"block and document have shapes {shapes}, must be one (rows, tokens); expand the smaller")
        for name, steps in (("block", self.block.diff(dim=1)), ("document", self.document.diff(dim=1))):
            if bool((steps < 0).any()):
                raise ValueError(f"{name} decreases along a row, must not; number them in the order of the tokens")
        if bool(((self.document.diff(dim=1) > 0) & (self.block.diff(dim=1) == 0)).any()):
            raise ValueError("a document starts inside a block, must start a block; see `make_layout`")

    @functools.cached_property
    def block_start(self) -> Tensor:
        """(r, t): the first position of each position's block."""
        return _starts(self.block)

    @functools.cached_property
    def block_end(self) -> Tensor:
        """(r, t): one past the last position of each position's block."""
        return self.block.shape[1] - _starts(-self.block.flip(1)).flip(1)

    @functools.cached_property
    def document_start(self) -> Tensor:
        """(r, t): the first position of each position's document."""
        return _starts(self.document)

    @functools.cached_property
    def position(self) -> Tensor:
        """(r, t): each position's index within its document."""
        return torch.arange(self.block.shape[1], device=self.block.device) - self.document_start

    def context_keys(self) -> tiled_attention.KeyReach:
        """Causal within a document."""
        token = torch.arange(self.block.shape[1], device=self.block.device)
        return tiled_attention.KeyReach(self.document_start, self.document_start, (token + 1).expand_as(self.block))

    def block_keys(self) -> tiled_attention.KeyReach:
        """The own block both ways, and the document before it."""
        return tiled_attention.KeyReach(self.document_start, self.block_start, self.block_end)

    def context_rows(self, width: int) -> seeded_conv.RowReach:
        """What a convolution of `width` taps reads in the context tower."""
        return seeded_conv.make_reach(self.document_start, self.document_start, width)

    def block_rows(self, width: int) -> seeded_conv.RowReach:
        """What a convolution of `width` taps reads in a block."""
        return seeded_conv.make_reach(self.document_start, self.block_start, width)

    def chunks(self, size: int) -> Chunks:
        return make_chunks(self.block, self.document, size)


def make_layout(document: Tensor, block_size: int, offset: Tensor | int = 0) -> Layout:
    """Blocks of `block_size` within each document of `document` (r, t).

    The grid starts `offset` tokens (an integer or (r,)) before each document, so a document's first block is that much
    shorter and its last may be short too.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}, must be at least 1")
    offset = torch.as_tensor(offset, device=document.device)
    if bool(((offset < 0) | (offset >= block_size)).any()):
        raise ValueError(f"offset is {offset.tolist()}, must be in [0, block_size={block_size})")
    place = torch.arange(document.shape[1], device=document.device) - _starts(document) + offset.view(-1, 1)
    first = (place - offset.view(-1, 1) == 0) | (place % block_size == 0)
    return Layout(first.long().cumsum(1) - 1, document.expand_as(first))


def _starts(index: Tensor) -> Tensor:
    """(r, t): the first position of the run of equal values that each position of index (r, t) belongs to."""
    token = torch.arange(index.shape[1], device=index.device).expand_as(index)
    changes = torch.ones_like(index, dtype=torch.bool)
    changes[:, 1:] = index.diff(dim=1) != 0
    return (token * changes).cummax(1).values
