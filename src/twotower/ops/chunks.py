"""Chunks of whole blocks for the training scan. Letters: r rows (b, or 1 where all rows agree), t tokens, c chunks,
q places of a chunk."""

from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """Every row cut into c chunks of whole blocks, each laid out in q places.

    `token` (r, c, q) int64 is the token in a place; a short chunk repeats its last token where `filled` (r, c, q) is
    False. `place` (r, t) int64 is each token's place in the flattened (c·q). `causal`, `past` and `own` (r, c, q, q)
    say whether place i of a chunk sees place j: tokens of its document up to itself, those of them in earlier blocks,
    and those of its own block. `continues` (r, c, q) says whether a place's document began before the chunk, `stays`
    (r, c, q) whether it is the document that the chunk ends in.
    """

    token: Tensor
    filled: Tensor
    place: Tensor
    causal: Tensor
    past: Tensor
    own: Tensor
    continues: Tensor
    stays: Tensor


def make_chunks(block: Tensor, document: Tensor, size: int) -> Chunks:
    """Packs as many whole blocks as `size` tokens hold into each chunk, at least one; a block is never cut.

    block, document (r, t) int64 are non-decreasing along a row, and a new document starts a new block. A chunk that
    held part of a block would need the state inside it; whole blocks need one state per chunk, whatever their lengths.
    """
    if size < 1:
        raise ValueError(f"chunk size is {size}, must be at least 1 token")
    r, t = block.shape
    starts = [_chunk_starts(row, size) for row in block.tolist()]
    c = max(len(row) for row in starts)
    # rows with fewer chunks end in empty ones
    edges = torch.tensor([row + [t] * (c + 1 - len(row)) for row in starts], device=block.device)  # (r, c+1)
    q = int((edges[:, 1:] - edges[:, :-1]).max())
    unbounded = edges[:, :-1, None] + torch.arange(q, device=block.device)  # (r, c, q)
    last = edges[:, 1:, None] - 1
    token = torch.minimum(unbounded, last)
    place = torch.zeros(r, t, dtype=torch.int64, device=block.device)
    filled = unbounded <= last
    flat = torch.arange(c * q, device=block.device).expand(r, -1).view(r, c, q)
    row = torch.arange(r, device=block.device)[:, None, None].expand(r, c, q)
    place[row[filled], token[filled]] = flat[filled]

    blocks, documents = (v.gather(1, token.flatten(1)).view(r, c, q) for v in (block, document))
    earlier = torch.ones(q, q, dtype=torch.bool, device=block.device).tril()
    causal = (documents.unsqueeze(-1) == documents.unsqueeze(-2)) & earlier
    own = (blocks.unsqueeze(-1) == blocks.unsqueeze(-2)) & earlier
    before = torch.cat((documents.new_full((r, 1), -1), documents[:, :-1, -1]), dim=1)  # (r, c): none before the first
    continues = documents == before.unsqueeze(-1)
    # -1 is also what padding may be called: nothing precedes the first chunk, whatever its documents' numbers
    continues[:, 0] = False
    return Chunks(token, filled, place, causal, causal & ~own, own, continues, documents == documents[..., -1:])


def to_chunks(x: Tensor, chunks: Chunks) -> Tensor:
    """x (b, t, …) to (b, c, q, …)."""
    return _take(x, chunks.token)


def from_chunks(x: Tensor, chunks: Chunks) -> Tensor:
    """x (b, c, q, …) to (b, t, …), dropping the places that hold no token."""
    return _take(x.flatten(1, 2), chunks.place)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (b, t, …) at index (r, …) along its second dimension."""
    b, t = x.shape[:2]
    if index.shape[0] == 1:
        return x.index_select(1, index.flatten()).view(b, *index.shape[1:], *x.shape[2:])
    offset = torch.arange(b, device=x.device).mul(t).view(b, *(1,) * (index.ndim - 1))
    return x.flatten(0, 1).index_select(0, (index + offset).flatten()).view(*index.shape, *x.shape[2:])


def _chunk_starts(block: list[int], size: int) -> list[int]:
    starts = [i for i in range(len(block)) if i == 0 or block[i] != block[i - 1]]
    chosen = [0]
    for start, end in zip(starts, [*starts[1:], len(block)], strict=True):
        if end - chosen[-1] > size and start > chosen[-1]:
            chosen.append(start)
    return chosen
