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


def likeliest_blocks(
    model: TwoTower, context: ContextState, newest: Sequence[int], widths: Sequence[int]
) -> list[list[int]]:
    """One denoising step over blocks of the given widths (b), [newest | masks]: the likeliest token of each mask."""
    device, size = model.denoiser_device, max(widths)
    block = torch.full((len(widths), size), model.config.mask_token_id, device=device)
    block[:, 0] = torch.tensor(newest, device=device)
    level = tuple((width - 1) / width for width in widths)
    ragged = tuple(widths) if min(widths) < size else None
    logits = model.denoiser_logits(block, model.seed(context), level, ragged)
    ids = model.denoiser_tower.logit_ops.argmax(logits).tolist()
    return [row[1:width] for row, width in zip(ids, widths, strict=True)]


def put_blocks(sampled: Tensor, blocks: Mapping[int, Sequence[int]]) -> Tensor:
    """vLLM's sampled tokens (b, s) with a block in the place of what some rows have: (b, s or the longest block)."""
    size = max([sampled.shape[1], *map(len, blocks.values())])
    table = F.pad(sampled, (0, size - sampled.shape[1]), value=_NONE)
    for row, block in blocks.items():
        table[row] = _NONE
        table[row, : len(block)] = torch.tensor(block, dtype=table.dtype)
    return table


def put_logprobs(logprobs: Any, rows: int, before: int, size: int) -> Any:
    """vLLM's log-probabilities of `rows` times `before` places, with `size` places for each row: what is added belongs
    to rows that asked for none. Named tuples of tensors, or None."""
    if logprobs is None or before == size:
        return logprobs

    def widened(table: Tensor) -> Tensor:
        wide = table.new_zeros((rows, size, *table.shape[1:]))
        wide[:, :before] = table.unflatten(0, (rows, before))
        return wide.flatten(0, 1)

    return logprobs._replace(
        **{name: widened(value) for name, value in logprobs._asdict().items() if isinstance(value, Tensor)}
    )
