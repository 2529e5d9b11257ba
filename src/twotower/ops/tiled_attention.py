"""Attention of the training pass, tile by tile. Letters: b batch, r rows of the layout (b or 1), h heads, k KV heads,
t tokens, p head width, s queries of a tile, m keys of a tile."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twotower.ops.attention import ScoreRule, cached_attention, masked

# Queries per tile. A tile's mask and weights are (s, m) and are freed with the tile.
TILE = 256
# The past of a tile ends at a multiple of this.
SPAN = 64


class KeyReach(NamedTuple):
    """Token i sees own keys in [own_start_i, own_end_i) and past keys in [past_start_i, own_start_i); (r, t) int64."""

    past_start: Tensor
    own_start: Tensor
    own_end: Tensor


class Tile(NamedTuple):
    """A slice of the queries, what each of them sees, and the slices of own and past keys that hold all of that."""

    queries: slice
    seen: KeyReach
    own: slice
    before: slice


def make_tiles(reach: KeyReach, size: int = TILE) -> list[Tile]:
    """Tiles of `size` queries. To be made once per layout: the slices' ends are read on the host, which waits for a
    GPU."""
    tiles = []
    for start in range(0, reach.own_start.shape[1], size):
        queries = slice(start, start + size)
        seen = KeyReach(*(edge[:, queries] for edge in reach))
        own = slice(int(seen.own_start.min()), int(seen.own_end.max()))
        # Rounded up: the last block's start moves with the grid's offset, and torch.compile compiles each length anew
        end = -(-int(seen.own_start.max()) // SPAN) * SPAN
        before = slice(int(seen.past_start.min()), min(end, reach.own_start.shape[1]))
        tiles.append(Tile(queries, seen, own, before))
    return tiles


def tiled_attention(
    q: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None, tiles: list[Tile], rule: ScoreRule
) -> Tensor:
    """Queries (b, h, t, p) over [own keys | past keys], one softmax; key, value and both of `past` (b, k, t, p).

    `past` None leaves out the past: with own_start at a document's start and own_end = i + 1 that is causal attention.
    Each tile reads only the keys that some query of it sees, and is recomputed in backward, so that what is saved is
    linear in t: no (t, 2t) mask, weights or copies of the keys.
    """
    pieces = []
    for queries, seen, own, before in tiles:
        keys, values = [key[:, :, own]], [value[:, :, own]]
        if past is not None:
            keys, values = [*keys, past[0][:, :, before]], [*values, past[1][:, :, before]]
        arguments = (q[:, :, queries], keys, values, queries.start, seen, own, before, rule)
        if torch.is_grad_enabled() and len(tiles) > 1:  # a lone tile is small enough to keep
            pieces.append(checkpoint(_tile, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(_tile(*arguments))
    return torch.cat(pieces, dim=2)


def _tile(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    start: int,
    seen: KeyReach,
    own: slice,
    before: slice,
    rule: ScoreRule,
) -> Tensor:
    """Queries (b, h, s, p) from token `start` on over their own keys in the span `own` and, where there are two, the
    past in `before`."""
    visible = _visible(seen, own, before if len(keys) == 2 else None)
    key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    if rule.softcap is not None or rule.sinks is not None or rule.slopes:  # these need the mask as numbers
        spans = (own, before)[: len(keys)]
        token = torch.cat([torch.arange(span.start, span.stop, device=q.device) for span in spans])
        distance = torch.arange(start, start + q.shape[2], device=q.device).unsqueeze(-1) - token
        visible = masked(~visible, distance, q.dtype, rule.slopes)
    return cached_attention(q, key, value, visible, rule)


def _visible(seen: KeyReach, own: slice, before: slice | None) -> Tensor:
    """(r, 1, s, m) bool over a tile's own keys, then its past ones."""
    past_start, own_start, own_end = (edge.unsqueeze(-1) for edge in seen)
    token = torch.arange(own.start, own.stop, device=own_start.device)
    visible = (token >= own_start) & (token < own_end)
    if before is not None:
        token = torch.arange(before.start, before.stop, device=own_start.device)
        visible = torch.cat((visible, (token >= past_start) & (token < own_start)), dim=-1)
    return visible.unsqueeze(1)
