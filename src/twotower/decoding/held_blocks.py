"""Blocks whose text must match a constraint. Letters: b rows, s positions of the block, v vocabulary.

What may come at a place depends on all places before it. So such a block is filled from left to right: a step commits
the longest beginning of its open places in which the constraint allows every token that the commit rule wants there,
and always the first, whose token is drawn among those allowed. The denoiser still proposes all places together, and
sees the whole block.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.backends.protocol import LogitOps
from twotower.decoding.sampling import Proposal, probability
from twotower.decoding.shaping import Shaping
from twotower.ops.transfer import to_device


class Proposed(NamedTuple):
    """What a step proposes for blocks: the denoiser's `logits` (b, s, v), tokens with their probabilities, and the
    places (b, s) bool that its commit rules want fixed."""

    logits: Tensor
    proposal: Proposal
    fixed: Tensor


class Held(NamedTuple):
    """What becomes of it: the settings with each constraint after its row's new tokens, the tokens of all places with
    their probabilities, and the places that are fixed."""

    shaping: Shaping
    proposal: Proposal
    fixed: Tensor


def hold(shaping: Shaping, opens: Sequence[int], widths: Sequence[int], proposed: Proposed, ops: LogitOps) -> Held:
    """Holds the rows with a constraint to it; other rows stay as they are.

    opens (b): each row's first open place; the places before it are fixed and all from there on are open. Waits for the
    proposals, because the host decides.
    """
    guides = shaping.guides
    rows = [row for row, guide in enumerate(guides.rows) if guide is not None]
    index = to_device(rows, proposed.fixed.device)
    tokens = proposed.proposal.tokens[index]
    matchers, ends = list(guides.rows), []
    ids = tokens.tolist()
    for row, own, wanted in zip(rows, ids, proposed.fixed[index].tolist(), strict=True):
        first, width = opens[row], widths[row]
        # other settings of the row may forbid the only token that is possible
        forces = shaping.edits[row] is None
        matchers[row], new = guides.follow_block(row, own[first:width], wanted[first:width], forces=forces)
        own[first : first + len(new)] = new
        ends.append(first + len(new))
    tokens = to_device(torch.tensor(ids), index.device)
    places = torch.arange(tokens.shape[1], device=index.device)
    logits = proposed.logits[index]
    confidence = probability(logits, tokens, ops.best(logits).log_sum)
    return Held(
        dataclasses.replace(shaping, guides=dataclasses.replace(guides, rows=tuple(matchers))),
        Proposal(
            proposed.proposal.tokens.index_copy(0, index, tokens),
            proposed.proposal.confidence.index_copy(0, index, confidence),
        ),
        proposed.fixed.index_copy(0, index, places < to_device(ends, index.device)[:, None]),
    )
