"""Chunks of whole blocks for the training scan. Letters: r rows (b, or 1 where all rows agree), t tokens, c chunks,
q places of a chunk, k blocks of a chunk, s places of a block."""

from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """Every row cut into c chunks of at most k whole blocks.

    The context tower's tokens lie in q places per chunk, the denoiser's in k·s places, s per block. `token` (r, c, q)
    and `block_token` (r, c, k, s) int64 are the token in a place; places left over repeat an earlier token and are
    False in `filled` and `block_filled`. `place` and `block_place` (r, t) int64 are each token's place, flattened.

    `causal` (r, c, q, q): place i sees place j, a token of its document up to itself. `before` (r, c, k, q): place j
    holds a token of the block's document in an earlier block. `continues` (r, c, q), `block_continues` (r, c, k): the
    document began before the chunk. `stays` (r, c, q): it is the document that the chunk ends in.
    """

    token: Tensor
    filled: Tensor
    place: Tensor
    block_token: Tensor
    block_filled: Tensor
    block_place: Tensor
    causal: Tensor
    before: Tensor
    continues: Tensor
    block_continues: Tensor
    stays: Tensor


def make_chunks(block: Tensor, document: Tensor, size: int) -> Chunks:
    """Chunks of as many blocks as fit into `size` tokens if all were as long as the longest, at least one.

    block, document (r, t) int64 are non-decreasing along a row, and a new document starts a new block. Chunks hold
    whole blocks, so that one state per chunk is enough: a chunk that ended inside a block would need the state there.
    """
    if size < 1:
        raise ValueError(f"chunk size is {size}, must be at least 1 token")
    r, t = block.shape
    token = torch.arange(t, device=block.device).expand(r, t)
    starts = torch.ones_like(block, dtype=torch.bool)
    starts[:, 1:] = block.diff(dim=1) != 0
    rank = starts.long().cumsum(1) - 1  # (r, t): consecutive numbers of the blocks
    in_block = token - (token * starts).cummax(1).values
    s = int(in_block.max()) + 1
    k = max(size // s, 1)
    chunk = rank // k
    in_chunk = token - (token * (starts & (rank % k == 0))).cummax(1).values
    c, q = int(chunk.max()) + 1, int(in_chunk.max()) + 1
    place, block_place = chunk * q + in_chunk, rank * s + in_block
    held, filled = _held(token, place, c * q)
    block_held, block_filled = _held(token, block_place, c * k * s)

    documents, ranks = (v.gather(1, held).view(r, c, q) for v in (document, rank))
    first = block_held.view(r, c, k, s)[..., 0].flatten(1)  # of each block
    block_documents, block_ranks = (v.gather(1, first).view(r, c, k) for v in (document, rank))
    earlier = torch.ones(q, q, dtype=torch.bool, device=block.device).tril()
    causal = (documents.unsqueeze(-1) == documents.unsqueeze(-2)) & earlier
    before = (block_documents.unsqueeze(-1) == documents.unsqueeze(-2)) & (
        block_ranks.unsqueeze(-1) > ranks.unsqueeze(-2)
    )
    previous = (
        documents[:, :, -1].roll(1, dims=1).unsqueeze(-1)
    )  # (r, c, 1): the document that the chunk before ends in
    later = (torch.arange(c, device=block.device) > 0).view(1, c, 1)
    return Chunks(
        held.view(r, c, q),
        filled.view(r, c, q),
        place,
        block_held.view(r, c, k, s),
        block_filled.view(r, c, k, s),
        block_place,
        causal,
        before,
        (documents == previous) & later,
        (block_documents == previous) & later,
        documents == documents[..., -1:],
    )


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (b, t, …) at index (r, …) along its second dimension: (b, …, …)."""
    b, t = x.shape[:2]
    if index.shape[0] == 1:
        return x.index_select(1, index.flatten()).view(b, *index.shape[1:], *x.shape[2:])
    offset = torch.arange(b, device=x.device).mul(t).view(b, *(1,) * (index.ndim - 1))
    return x.flatten(0, 1).index_select(0, (index + offset).flatten()).view(*index.shape, *x.shape[2:])


def _held(token: Tensor, place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The token in each of `size` places, and False where the place only repeats an earlier token: both (r, size)."""
    held = token.new_full((token.shape[0], size), -1).scatter_(1, place, token)
    return held.cummax(1).values, held >= 0
