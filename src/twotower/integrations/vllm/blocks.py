"""Blocks of mode `diffusion`, written in the place of the token that vLLM has sampled."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.decoding import diffusion
from twotower.decoding.output import Token
from twotower.decoding.step import Request, step
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower

# How vLLM marks places without a token
_NONE = -1


class Filled(NamedTuple):
    """One row's block, and the passes of the denoiser that filled it."""

    tokens: tuple[Token, ...]
    num_calls: int


def fill_blocks(model: TwoTower, requests: tuple[Request, ...], context: ContextState) -> list[Filled]:
    """The next block of each request, whose `context_ids` the context holds. The context tower is not used."""
    rows = diffusion.start(model, requests, context)
    places = list(range(len(requests)))
    found: dict[int, Filled] = {}
    calls = 0
    while places:
        stepped = step(diffusion, model, rows)
        calls += 1
        found |= {place: Filled(tokens, calls) for place, tokens in zip(places, stepped.tokens, strict=True) if tokens}
        going = [n for n, tokens in enumerate(stepped.tokens) if not tokens]
        left = stepped.rows if len(going) in (0, len(places)) else stepped.rows.select(going)
        rows = cast(diffusion.DiffusionRows, left)  # what its own step gives
        places = [places[n] for n in going]
    return [found[place] for place in range(len(requests))]


def put_blocks(sampled: Tensor, blocks: Mapping[int, Sequence[int]]) -> Tensor:
    """vLLM's sampled tokens (b, s) with a block in the place of what some rows have: (b, s or the longest block)."""
    size = max([sampled.shape[1], *map(len, blocks.values())])
    table = F.pad(sampled, (0, size - sampled.shape[1]), value=_NONE)
    for row, block in blocks.items():
        table[row] = _NONE
        table[row, : len(block)] = torch.tensor(block, dtype=table.dtype)
    return table


def put_logprobs(logprobs: Any, sampled: Tensor, blocks: Mapping[int, Sequence[Token]], size: int) -> Any:
    """vLLM's LogprobsTensors of sampled tokens (b, s), or None, with `size` places for each row and with the blocks'
    where they have some: at each place [the chosen token | the likeliest] and its rank."""
    if logprobs is None:
        return None
    rows, before = sampled.shape
    known = {row: block for row, block in blocks.items() if block[0].rank}
    most = 1 + max((len(block[0].top) for block in known.values()), default=0)

    def widened(table: Tensor) -> Tensor:
        wide = table.new_zeros((rows, size, *table.shape[1:]))
        wide[:, :before] = table.unflatten(0, (rows, before))
        # vLLM makes too few numbers of a place where another row asks for tokens by their ids
        return F.pad(wide, (0, max(0, most - wide.shape[2]))) if wide.dim() == 3 else wide

    ids, values = widened(logprobs.logprob_token_ids), widened(logprobs.logprobs)
    ranks = widened(logprobs.selected_token_ranks)
    for row, block in known.items():
        width, num = len(block), 1 + len(block[0].top)
        pairs = [[(token.id, token.logprob), *token.top] for token in block]  # (s, 1 + k, 2)
        ids[row, :width, :num] = torch.tensor([[i for i, _ in place] for place in pairs], dtype=ids.dtype)
        values[row, :width, :num] = torch.tensor([[p for _, p in place] for place in pairs], dtype=values.dtype)
        ranks[row, :width] = torch.tensor([token.rank for token in block], dtype=ranks.dtype)
    return logprobs._replace(
        logprob_token_ids=ids.flatten(0, 1), logprobs=values.flatten(0, 1), selected_token_ranks=ranks.flatten()
    )
