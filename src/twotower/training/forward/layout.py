"""Where blocks and documents lie in a training batch, and what each position of them may see.

The clean tokens x0 go through the context tower, which is causal within a document. The noisy tokens xt go through the
denoiser: position i sees all noisy tokens of its own block, and the clean tokens of its document before the block. With
blocks of 2 tokens and two documents of 4 and 3 tokens, x for what position i sees as position j:

                           context tower          denoiser
                           clean j                clean j                noisy j
    document  block  i     0 1 2 3 4 5 6          0 1 2 3 4 5 6          0 1 2 3 4 5 6
        0       0    0     x                                             x x
        0       0    1     x x                                           x x
        0       1    2     x x x                  x x                        x x
        0       1    3     x x x x                x x                        x x
        1       2    4             x                                             x x
        1       2    5             x x                                           x x
        1       3    6             x x x                  x x                        x

The denoiser's two parts are the masks M_OBC and M_BD of BD3-LM (arXiv 2503.09573), so one pass over [x0 | xt] trains
every block as decoding would run it. Attention reads these positions; a convolution those of them that its taps reach;
an SSM's state before a block is the context tower's after the clean tokens that the block sees.

Letters: r rows (b, or 1 where all agree), t tokens.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from twotower.errors import SettingError
from twotower.ops import seeded_conv, tiled_attention
from twotower.ops.chunks import Chunks, make_chunks
from twotower.rope import AttentionType


@dataclasses.dataclass(frozen=True)
class Layout:
    """`block` and `document` (r, t) int64 number each position's block and document, non-decreasing along a row.

    Every document starts a new block, and no document sees another. Padding is a document that is never scored. Raises
    ValueError for numbers that break these rules.
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
    def document_length(self) -> Tensor:
        """(r, t): the number of tokens of each position's document."""
        return self.block.shape[1] - _starts(-self.document.flip(1)).flip(1) - self.document_start

    @functools.cached_property
    def position(self) -> Tensor:
        """(r, t): each position's index within its document."""
        return torch.arange(self.block.shape[1], device=self.block.device) - self.document_start

    def context_keys(self, kind: AttentionType) -> tiled_attention.KeyReach:
        """The keys that the context tower's queries see: causal within a document, as far back as `kind` says."""
        token = torch.arange(self.block.shape[1], device=self.block.device)
        first = self._first(kind)
        return tiled_attention.KeyReach(first, first, (token + 1).expand_as(self.block))

    def block_keys(self, kind: AttentionType) -> tiled_attention.KeyReach:
        """The keys that the denoiser's queries see: of their own block, and of the clean document before it, as far as
        `kind` says on either side."""
        token = torch.arange(self.block.shape[1], device=self.block.device)
        first, end = self._first(kind), self.block_end
        if kind.window is not None:
            end = end.minimum(token + kind.window)
        if kind.chunk is not None:
            end = end.minimum(token - self.position % kind.chunk + kind.chunk)
        return tiled_attention.KeyReach(first, first.maximum(self.block_start), end)

    def _first(self, kind: AttentionType) -> Tensor:
        """(r, t): the first position that each position's query reaches back to."""
        token = torch.arange(self.block.shape[1], device=self.block.device)
        first = self.document_start
        if kind.window is not None:
            first = first.maximum(token - kind.window + 1)
        return first if kind.chunk is None else first.maximum(token - self.position % kind.chunk)

    def context_rows(self, width: int) -> seeded_conv.RowReach:
        """The rows that a convolution of `width` taps reads in the context tower."""
        return seeded_conv.make_reach(self.document_start, self.document_start, width)

    def block_rows(self, width: int) -> seeded_conv.RowReach:
        """The rows that a convolution of `width` taps reads in the denoiser: of its block, and clean ones before it."""
        return seeded_conv.make_reach(self.document_start, self.block_start, width)

    def chunks(self, size: int) -> Chunks:
        """The rows cut into chunks of whole blocks, about `size` tokens each, for the scan."""
        return make_chunks(self.block, self.document, size)


def make_layout(document: Tensor, block_size: int, offset: Tensor | int = 0) -> Layout:
    """Blocks of `block_size` tokens within each document of `document` (r, t) int64.

    The grid of blocks starts `offset` tokens before each document, so that a document's first block is shorter by
    `offset`; its last may be short too. `offset` is an integer, or (r,), or (r, t), the same in all of a document.
    Raises ValueError for an offset outside [0, block_size).
    """
    if block_size < 1:
        raise SettingError("block_size", block_size, "at least 1")
    offset = torch.as_tensor(offset, device=document.device)
    if bool(((offset < 0) | (offset >= block_size)).any()):
        raise ValueError(f"offset is {offset.tolist()}, must be in [0, block_size={block_size})")
    offset = offset if offset.ndim == 2 else offset.view(-1, 1)
    place = torch.arange(document.shape[1], device=document.device) - _starts(document)
    first = (place == 0) | ((place + offset) % block_size == 0)
    return Layout(first.long().cumsum(1) - 1, document.expand_as(first))


def answer_offsets(document: Tensor, scored: Tensor, block_size: int) -> Tensor:
    """(r, t): the offsets of `make_layout` with which a block begins at the first scored token of each document, where
    decoding begins an answer to the tokens before it; 0 where a document has none. Both (r, t)."""
    token = torch.arange(document.shape[1], device=document.device).expand_as(document)
    start = _starts(document)
    unset = document.shape[1]
    first = torch.full_like(document, unset).scatter_reduce(1, start, token.masked_fill(~scored, unset), "amin")
    first = first.gather(1, start)  # (r, t)
    return torch.where(first < unset, (start - first) % block_size, 0)


def _starts(index: Tensor) -> Tensor:
    """(r, t): the first position of the run of equal values that each position of index (r, t) belongs to."""
    token = torch.arange(index.shape[1], device=index.device).expand_as(index)
    changes = torch.ones_like(index, dtype=torch.bool)
    changes[:, 1:] = index.diff(dim=1) != 0
    return (token * changes).cummax(1).values
