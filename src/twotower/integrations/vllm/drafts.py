"""Drafts of the denoiser for vLLM's rejection sampler. Letters: b rows, s places of a block, d tokens of a draft, t of
the drafts of all rows, v vocabulary."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.decoding.drafting.denoiser import DRAW
from twotower.decoding.params import SamplingParams
from twotower.decoding.sampling import distribution, inverse_sample, temper, uniform_table
from twotower.integrations.vllm.diffusion_params import VllmParams, seed_of
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device

# What our settings take; any temperature will do to draft with
_HOTTEST = 100.0


class Draw(NamedTuple):
    """How a row's draft is drawn: its settings, where temperature 0 takes the likeliest tokens, and its seed."""

    params: SamplingParams
    seed: int


class Drafts(NamedTuple):
    """Each row's draft (b, d), and of the rows whose drafts were drawn, by their places, the probabilities (d, v) of
    all tokens with which each was."""

    tokens: list[list[int]]
    probabilities: dict[int, Tensor]


def draw_of(params: VllmParams | None, request_id: str) -> Draw:
    """How to draft for a request with vLLM's parameters: with its temperature and its filters, so that more is kept.

    Under a grammar the likeliest are drafted. vLLM cuts off what the grammar refuses, which it may not do with a token
    that was drawn: where another token would have been kept there, the text would have another distribution.
    """
    if params is None or params.structured_outputs is not None:
        ours = SamplingParams(temperature=0)
    else:
        ours = SamplingParams(
            temperature=min(params.temperature, _HOTTEST),
            top_k=params.top_k if params.top_k > 0 else None,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=None if params.seed is None else params.seed % 2**63,
        )
    return Draw(ours, seed_of(ours, request_id))


def draft_blocks(
    model: TwoTower, context: ContextState, newest: Sequence[int], widths: Sequence[int], draws: Sequence[Draw]
) -> Drafts:
    """One denoising step over blocks of the given widths (b), [newest | masks]: a token for each mask."""
    device, size = model.denoiser_device, max(widths)
    block = torch.full((len(widths), size), model.config.mask_token_id, device=device)
    block[:, 0] = torch.tensor(newest, device=device)
    level = tuple((width - 1) / width for width in widths)
    ragged = tuple(widths) if min(widths) < size else None
    logits = model.denoiser_logits(block, model.seed(context), level, ragged)
    ids = model.denoiser_tower.logit_ops.argmax(logits)
    drawn = [place for place, draw in enumerate(draws) if draw.params.temperature]
    probabilities: dict[int, Tensor] = {}
    if drawn:
        rows = to_device(drawn, device)
        found = distribution(logits[rows], temper(tuple(draws[n].params for n in drawn), logits.shape[-1], device))
        lengths, seeds = [context.lengths[n] for n in drawn], [draws[n].seed for n in drawn]
        table = uniform_table(seeds, lengths, (DRAW,) * len(drawn), [widths[n] for n in drawn], size)
        ids[rows] = inverse_sample(found, to_device(table, device))
        probabilities = {n: found[row, 1 : widths[n]] for row, n in enumerate(drawn)}
    return Drafts([row[1:width] for row, width in zip(ids.tolist(), widths, strict=True)], probabilities)


def probabilities_of(
    drafts: Tensor, rows: Sequence[tuple[str, int]], drawn: Mapping[str, Tensor], vocab_size: int
) -> Tensor | None:
    """With which probabilities (t, v) float32 the drafts (t) of all rows came about, where each row has a name and so
    many tokens in turn: those that were drawn from, else 1 for the drafted token. None where nothing was drawn."""
    if not any(name in drawn for name, num in rows if num):
        return None
    table = F.one_hot(drafts.long(), vocab_size).float()
    start = 0
    for name, num in rows:
        if name in drawn:
            table[start : start + num] = drawn[name][:num]
        start += num
    return table
