"""Drafts of the denoiser: one denoising step over a block of masks. Letters: r rows, s places of the block,
v vocabulary."""

from collections.abc import Sequence

import torch

from twotower.decoding.drafting.draft import Proposal, VerifiedRows
from twotower.decoding.sampling import distribution, greedy_tokens, inverse_sample, uniform_table
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device

# Keeps the draws of a draft apart from those of its check, see `verified`.
DRAW = 1 << 21


def propose(model: TwoTower, rows: VerifiedRows, places: Sequence[int]) -> Proposal:
    """One denoising step over [newest | masks]: each place's draft depends only on the context and the newest token."""
    if len(places) < len(rows.requests):
        rows = rows.select(list(places))
    device = model.denoiser_device
    widths = tuple(_width(rows, place) for place in range(len(rows.requests)))
    size, num_known = max(widths), rows.num_known
    block = torch.full((len(widths), size), model.config.mask_token_id, device=device)
    if num_known:
        block[:, 0] = to_device(rows.newest, device)
    level = tuple((w - num_known) / w for w in widths)
    ragged = widths if min(widths) < size else None
    logits = model.denoiser_logits(block, model.seed(rows.context), level, ragged).to(model.context_device)
    # a draft may be drawn from anything that is settled before it; settings of the request make it likelier to be kept
    shaped = rows.shaping.apply_to_blocks(logits, num_known)
    if rows.settings.all_greedy:
        ops = model.context_tower.logit_ops
        ids, probabilities = greedy_tokens(ops.argmax(logits), shaped, ops), None
    else:
        probabilities = distribution(logits, rows.settings, shaped)
        seeds = [r.seed for r in rows.requests]
        draws = uniform_table(seeds, rows.context.lengths, (DRAW,) * len(widths), widths, size)
        ids = inverse_sample(probabilities, to_device(draws, probabilities.device))
    if num_known:
        ids[:, 0] = block[:, 0].to(model.context_device)
    return Proposal(ids, widths, probabilities)


def next_length(width: int, num_emitted: int) -> int:
    """The length of the next draft: doubled if all of it was kept, else two more than the tokens that it gave. A
    longer draft would cost both towers arithmetic on tokens that are then rejected."""
    return 2 * width if num_emitted >= width else num_emitted + 2


def _width(rows: VerifiedRows, place: int) -> int:
    """The block's width: S or the adaptive draft's length, less if fewer tokens are left to write."""
    request, most = rows.requests[place], rows.most(place)
    return max(1, min(most, request.draft)) if request.params.adaptive_draft else most
