"""The draft of a batch whose rows may have different drafters. Letters: b rows, r rows of one drafter, s places,
v vocabulary."""

from collections.abc import Iterable
from typing import NamedTuple

import torch.nn.functional as F

from twotower.decoding.drafters import DRAFTERS, draft_sources
from twotower.decoding.drafting.draft import Draft, Proposal, VerifiedRows
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device


class _Part(NamedTuple):
    """What one source proposed, its name, and for which rows."""

    name: str
    places: list[int]
    proposal: Proposal


def propose_draft(model: TwoTower, rows: VerifiedRows) -> Draft:
    """The draft of every row by the first of its sources that has one.

    Only rows that ask a source cost it work, and the denoiser runs once, for all rows that need it. A row for which no
    source has a draft gets none: its pass is that of `ar`. Before the first token, where there is nothing to absorb, it
    drafts the likeliest token by the logits that are there already.
    """
    chains = [iter(draft_sources(r.params.drafter or "denoiser")) for r in rows.requests]
    asked: dict[str, list[int]] = {}

    def ask_next(places: Iterable[int]) -> None:
        for place in places:
            room = rows.most(place) > rows.num_known
            source = next(chains[place], None) if room else None
            asked.setdefault("" if source is None else source.name, []).append(place)

    ask_next(range(len(chains)))
    parts: list[_Part] = []
    while asked:
        name = min(asked, key=_turn)
        places = sorted(asked.pop(name))
        if not name:
            parts.append(_Part(name, places, _likeliest(model, rows, places)))
            continue
        proposal = DRAFTERS[name].drafter.propose(model, rows, places)
        told = [n for n, width in enumerate(proposal.widths) if width > rows.num_known]
        if told:
            parts.append(_Part(name, [places[n] for n in told], _kept(proposal, told)))
        if len(told) < len(places):
            ask_next(place for n, place in enumerate(places) if proposal.widths[n] <= rows.num_known)
    return _joined(rows, parts)


def _turn(name: str) -> int:
    """The order in which sources are asked: those that read texts, then the denoiser, then rows without a draft."""
    if not name:
        return 2
    return 1 if DRAFTERS[name].uses_denoiser else 0


def _likeliest(model: TwoTower, rows: VerifiedRows, places: list[int]) -> Proposal:
    """The newest token alone, or before the first one the likeliest by the prompt's logits."""
    if rows.newest:
        newest = tuple([rows.newest[place]] for place in places)
        return Proposal(to_device(newest, model.context_device), (1,) * len(places), blocks=newest)
    assert rows.context.next_logits is not None
    ops = model.context_tower.logit_ops
    ids = ops.argmax(rows.context.next_logits)[to_device(places, model.context_device)]
    return Proposal(ids[:, None], (1,) * len(places))


def _kept(proposal: Proposal, rows: list[int]) -> Proposal:
    """Some rows of a proposal; itself where these are all."""
    if len(rows) == len(proposal.widths):
        return proposal
    at = to_device(rows, proposal.ids.device)
    probabilities = None if proposal.probabilities is None else proposal.probabilities[at]
    blocks = None if proposal.blocks is None else tuple(proposal.blocks[n] for n in rows)
    return Proposal(proposal.ids[at], tuple(proposal.widths[n] for n in rows), probabilities, blocks)


def _joined(rows: VerifiedRows, parts: list[_Part]) -> Draft:
    """The sources' blocks as one batch, padded to the widest."""
    if len(parts) == 1:
        [(name, places, proposal)] = parts
        own = () if proposal.probabilities is None else tuple(places)
        return Draft(proposal.ids, proposal.widths, (name,) * len(places), own, proposal.probabilities, proposal.blocks)
    num_rows = len(rows.requests)
    size = max(part.proposal.ids.shape[1] for part in parts)
    ids = parts[0].proposal.ids.new_zeros(num_rows, size)
    widths, names = [0] * num_rows, [""] * num_rows
    drawn: tuple[int, ...] = ()
    probabilities = None
    blocks: dict[int, list[int]] = {}
    for name, places, proposal in parts:
        s = proposal.ids.shape[1]
        ids[to_device(places, ids.device), :s] = proposal.ids
        for place, width in zip(places, proposal.widths, strict=True):
            widths[place], names[place] = width, name
        blocks |= dict(zip(places, proposal.blocks or (), strict=False))
        if proposal.probabilities is not None:
            assert probabilities is None, "one source draws, the denoiser, and it runs once"
            drawn, probabilities = tuple(places), F.pad(proposal.probabilities, (0, 0, 0, size - s))
    known = tuple(blocks[row] for row in range(num_rows)) if len(blocks) == num_rows else None
    return Draft(ids, tuple(widths), tuple(names), drawn, probabilities, known)
