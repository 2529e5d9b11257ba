"""Mode `verified`: a drafter proposes tokens, and a context tower pass over the draft decides how many to keep.

The drafters are in `decoding.drafting`. The output has exactly the distribution of `ar` (speculative sampling,
Leviathan et al. 2023; Chen et al. 2023).
Letters: b rows, s places of the draft's block, n places that the pass decides, those that weren't known and the one
after them, v vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.decoding.drafters import DRAFTERS
from twotower.decoding.drafting import denoiser
from twotower.decoding.drafting.draft import Draft, VerifiedRows
from twotower.decoding.drafting.propose import propose_draft
from twotower.decoding.drafting.written import Written
from twotower.decoding.likeliest import likeliest, numbers_asked, read_top, with_tops
from twotower.decoding.output import DraftCount, Token
from twotower.decoding.sampling import (
    distribution,
    greedy_tokens,
    inverse_sample,
    probability,
    results,
    temper,
    uniform_table,
    uniforms,
)
from twotower.decoding.shaping import shaping
from twotower.decoding.step import BatchStep, Request
from twotower.model.passes import CausalPass
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device

# Step numbers of the counter-based generator that keep draft, acceptance and correction draws of one round apart.
_ACCEPT, _CORRECT = 2 * denoiser.DRAW, 4 * denoiser.DRAW


class Verdict(NamedTuple):
    """The decision: how many leading ids of its block each row keeps (b), the token after them (b), and the ids (b, n)
    from the first place on that wasn't known, with their probabilities, which are valid up to that token."""

    accepted: tuple[int, ...]
    bonus: tuple[int, ...]
    ids: list[list[int]]
    confidence: list[list[float]]


def context_ids(request: Request) -> tuple[int, ...]:
    """The ids that the context must hold when the request starts: all except the newest produced token, if any."""
    return request.prompt_ids + request.produced[:-1]


def start(model: TwoTower, requests: tuple[Request, ...], context: ContextState) -> VerifiedRows:
    """Rows whose `context_ids` are absorbed; either all of them have produced tokens or none has."""
    settings = temper(tuple(r.params for r in requests), model.config.vocab_size, model.context_device)
    newest = tuple(r.produced[-1] for r in requests if r.produced)
    assert len(newest) in (0, len(requests))
    shape, produced = shaping(model, requests, model.context_device), tuple(len(r.produced) for r in requests)
    written = tuple(Written.of(r.prompt_ids + r.produced) for r in requests)
    return VerifiedRows(requests, context, settings, shape, produced, written, newest)


class Judged(NamedTuple):
    """The pass over a draft before its results are read. `results` (3 + m, b, n): each row's ids from the first place
    on that wasn't known, up to the bonus token, and unused ids; their probabilities; at every place the number of
    accepted ids; and the numbers of `likeliest`. The counts are missing where `counts_apart`: the host knows the draft
    and compares it with the ids itself, in less time than the devices' small operations take."""

    model: TwoTower
    rows: VerifiedRows
    draft: Draft
    scored: CausalPass
    results: Tensor
    counts_apart: bool

    def finish(self, values: list[Any]) -> BatchStep:
        rows, draft, num_known = self.rows, self.draft, self.rows.num_known
        tops = values[2:] if self.counts_apart else values[3:]
        found = verdict(values, draft, num_known, counts_apart=self.counts_apart)
        emitted = []
        for row, (count, ids, confidence) in enumerate(zip(found.accepted, found.ids, found.confidence, strict=True)):
            num_top = rows.requests[row].params.logprobs
            new = range(count + 1 - num_known)
            emitted.append(tuple(Token(ids[n], 0, confidence[n], *read_top(tops, row, n, num_top)) for n in new))
        new_ids = [[token.id for token in tokens] for tokens in emitted]
        after = dataclasses.replace(
            rows,
            requests=tuple(map(_after_draft, rows.requests, draft.drafters, draft.widths, emitted)),
            context=self.model.accept(self.scored, found.accepted),
            shaping=rows.shaping.after(new_ids),
            produced=tuple(n + len(t) for n, t in zip(rows.produced, emitted, strict=True)),
            written=tuple(text.after(ids) for text, ids in zip(rows.written, new_ids, strict=True)),
            newest=found.bonus,
        )
        drafts = tuple(
            DraftCount(name, width - num_known, count - num_known) if name else None
            for name, width, count in zip(draft.drafters, draft.widths, found.accepted, strict=True)
        )
        passes = tuple(int(bool(name) and DRAFTERS[name].uses_denoiser) for name in draft.drafters)
        return BatchStep(after, tuple(emitted), passes, (1,) * len(emitted), drafts)


def launch(model: TwoTower, rows: VerifiedRows) -> Judged:
    """One round: a draft and one context pass over it, which gives the accepted tokens and a bonus token.

    The first place of a block is the newest token, which is decided but not absorbed yet, so that one context pass both
    absorbs it and verifies the rest. The first round has no such token and drafts every place.
    """
    return judge(model, rows, propose_draft(model, rows))


def judge(model: TwoTower, rows: VerifiedRows, draft: Draft) -> Judged:
    """Launches the context tower's pass over the draft and the decision.

    Greedy rows keep the prefix that equals its argmax. Others accept x with probability min(1, p/q), and at a rejection
    sample from the normalised positive part of p − q. Rows with a constraint, penalties or bad words of several tokens
    wait here for the draft's ids, because what may come at a place depends on those before it.
    """
    num_known, widths = rows.num_known, draft.widths
    scored = model.score(draft.ids, rows.context)
    own = model.scored_logits(scored)  # (b, n, v): own[:, i] predicts place num_known + i
    if not num_known:
        assert rows.context.next_logits is not None
        own = torch.cat((rows.context.next_logits.unsqueeze(1), own), dim=1)
    drafted = draft.ids[:, num_known:]  # (b, n-1)
    drafts = drafted.tolist() if rows.shaping.reads_drafts else [()] * len(rows.requests)
    shaped = rows.shaping.apply(own, drafts)
    ops = model.context_tower.logit_ops
    best = ops.best(own)
    if rows.settings.all_greedy:
        emitted = greedy_tokens(best.tokens, shaped, ops)  # (b, n), equal to the draft as far as that is accepted
        accepted = None if draft.blocks is not None else _prefix(drafted == emitted[:, :-1], widths, num_known)
    else:
        p = distribution(own, rows.settings, shaped)
        ratio = p[:, :-1].gather(-1, drafted.unsqueeze(-1)).squeeze(-1) / _chances(draft)[:, num_known:]
        draws = _table(rows, _ACCEPT, widths, draft.ids.shape[1])[:, num_known:]
        accepted = _prefix(draws < ratio, widths, num_known)
        after = _correction(rows, draft, p, accepted)
        emitted = F.pad(drafted, (0, 1)).scatter(1, (accepted - num_known)[:, None], after[:, None])
    # (b, n): the probabilities without the request's settings
    confidence = best.probability if emitted is best.tokens else probability(own, emitted, best.log_sum)
    found = results(emitted, confidence)
    if accepted is not None:  # in the same tensor, so that one copy to the host is enough
        found = torch.cat((found, accepted.double()[None, :, None].expand(1, *emitted.shape)))
    if numbers_asked(rows.requests, own.shape[-1]):
        found = with_tops(found, likeliest(rows.requests, own, emitted, ops))
    return Judged(model, rows, draft, scored, found, accepted is None)


def _prefix(agrees: Tensor, widths: tuple[int, ...], num_known: int) -> Tensor:
    """How many places of each row are accepted (b,): those that are known and the following ones that agree (b, n-1),
    within the row's width."""
    if min(widths) < num_known + agrees.shape[1]:
        places = torch.arange(num_known, num_known + agrees.shape[1], device=agrees.device)
        agrees = agrees & (places < to_device(widths, places.device)[:, None])
    return agrees.cumprod(-1).sum(-1) + num_known


def verdict(values: list[Any], draft: Draft, num_known: int, *, counts_apart: bool) -> Verdict:
    """The decision from `Judged.results`, once they are on the host."""
    ids = [[int(i) for i in row] for row in values[0]]
    if counts_apart:
        assert draft.blocks is not None
        counts = tuple(
            num_known + _agreeing(block[num_known:], own) for block, own in zip(draft.blocks, ids, strict=True)
        )
    else:
        counts = tuple(int(row[0]) for row in values[2])
    bonus = tuple(row[count - num_known] for row, count in zip(ids, counts, strict=True))
    return Verdict(counts, bonus, ids, values[1])


def _agreeing(drafted: Sequence[int], ids: Sequence[int]) -> int:
    """How many leading ids of a draft are those of `ids`, which are more."""
    return next((n for n, i in enumerate(drafted) if i != ids[n]), len(drafted))


def _after_draft(request: Request, drafter: str, width: int, emitted: Sequence[Token]) -> Request:
    """The request with the length of its next draft, where the denoiser's drafts follow what was kept."""
    if drafter and DRAFTERS[drafter].uses_denoiser:
        return request._replace(draft=denoiser.next_length(width, len(emitted)))
    return request


def _chances(draft: Draft) -> Tensor:
    """The probability q with which each id was drafted, (b, s): 1 where nothing was drawn."""
    q = torch.ones(draft.ids.shape, dtype=torch.float32, device=draft.ids.device)
    if draft.probabilities is not None:
        at = to_device(draft.drawn, q.device)
        q[at] = draft.probabilities.gather(-1, draft.ids[at].unsqueeze(-1)).squeeze(-1).clamp(min=1e-38)
    return q


def _correction(rows: VerifiedRows, draft: Draft, p: Tensor, accepted: Tensor) -> Tensor:
    """The token after the accepted prefix (b,): from (p − q)⁺ at a rejection, from p after a fully accepted draft."""
    widths, device, s = draft.widths, p.device, draft.ids.shape[1]
    row = torch.arange(len(widths), device=device)
    there = p[row, accepted - rows.num_known]  # (b, v)
    rejected = accepted < to_device(widths, device)
    place = accepted.clamp(max=s - 1)
    drafted = torch.zeros_like(there).scatter_(1, draft.ids[row, place][:, None], 1.0)
    if draft.probabilities is not None:
        at = to_device(draft.drawn, device)
        drafted[at] = draft.probabilities[torch.arange(len(at), device=device), place[at]]
    residual = (there - drafted).clamp(min=0)
    # if p = q up to rounding, nothing is left to sample from; such a rejection has probability ~0, and p is the limit
    usable = rejected & (residual.sum(-1) > 0)
    weights = torch.where(usable[:, None], residual, there)
    # The draw is keyed by the token's own position, because two rounds may start at the same one (after a first round
    # that accepts nothing). One is made for every possible count, because the host doesn't know the count yet.
    table = torch.zeros(len(widths), s + 1, dtype=torch.float32)
    for r, (request, n, width) in enumerate(zip(rows.requests, rows.context.lengths, widths, strict=True)):
        if request.temperature > 0:
            table[r, : width + 1] = torch.cat([uniforms(request.seed, n + k, _CORRECT, 1) for k in range(width + 1)])
    draws = to_device(table, p.device).gather(1, accepted[:, None])
    return inverse_sample(weights.unsqueeze(1), draws)[:, 0]


def _table(rows: VerifiedRows, purpose: int, widths: tuple[int, ...], size: int) -> Tensor:
    """Uniforms (b, size) keyed by each row's seed, its context length and the purpose of the draw."""
    seeds = [r.seed for r in rows.requests]
    table = uniform_table(seeds, rows.context.lengths, (purpose,) * len(widths), widths, size)
    return to_device(table, rows.settings.top_k.device)
