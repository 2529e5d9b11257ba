"""Mode `verified`: the denoiser drafts tokens, and a context tower pass over the draft decides how many to keep.

The output has exactly the distribution of `ar` (speculative sampling, Leviathan et al. 2023; Chen et al. 2023).
Letters: b rows, s positions of the draft block, v vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.decoding.likeliest import likeliest, read_top, with_tops
from twotower.decoding.output import Token
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
from twotower.decoding.shaping import Shaping, shaping
from twotower.decoding.step import BatchStep, Request, RowBatch
from twotower.model.passes import CausalPass
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device

# Step numbers of the counter-based generator that keep draft, acceptance and correction draws of one round apart.
_DRAFT, _ACCEPT, _CORRECT = 1 << 21, 1 << 22, 1 << 23


@dataclasses.dataclass(frozen=True)
class VerifiedRows(RowBatch):
    """Rows whose context holds all their tokens except the `newest` (b), which is empty before the first tokens;
    `produced` (b) counts each row's new tokens."""

    shaping: Shaping
    produced: tuple[int, ...]
    newest: tuple[int, ...] = ()

    @property
    def joins(self) -> bool:
        return bool(self.newest)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the rows' next draft blocks."""
        return tuple(_width(r, n) for r, n in zip(self.requests, self.produced, strict=True))


class Draft(NamedTuple):
    """ids (b, s) to verify and, unless all rows are greedy, the distributions (b, s, v) they were drawn from."""

    ids: Tensor
    probabilities: Tensor | None


class Verdict(NamedTuple):
    """The decision: how many leading draft ids each row keeps (b), the token after them (b), and all ids (b, s+1) with
    their probabilities, which are valid up to that token."""

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
    return VerifiedRows(requests, context, settings, shape, produced, newest)


class Judged(NamedTuple):
    """The pass over a draft before its results are read. `results` (2 + 2k, b, s+2): each row's number of accepted
    ids, then these ids, the bonus token and unused ids; beside the ids their probabilities and the likeliest tokens."""

    model: TwoTower
    rows: VerifiedRows
    scored: CausalPass
    results: Tensor

    def finish(self, values: list[Any]) -> BatchStep:
        rows, found, tops = self.rows, verdict(values), values[2:]
        num_known = 1 if rows.newest else 0
        emitted = []
        for row, (count, ids, confidence) in enumerate(zip(found.accepted, found.ids, found.confidence, strict=True)):
            num_top = rows.requests[row].params.logprobs
            new = range(num_known, count + 1)
            emitted.append(tuple(Token(ids[n], 0, confidence[n], read_top(tops, row, n + 1, num_top)) for n in new))
        ones = (1,) * len(emitted)
        lengths = (_next_draft(w, len(t)) for w, t in zip(rows.widths, emitted, strict=True))
        after = dataclasses.replace(
            rows,
            requests=tuple(r._replace(draft=n) for r, n in zip(rows.requests, lengths, strict=True)),
            context=self.model.accept(self.scored, found.accepted),
            shaping=rows.shaping.after([[token.id for token in tokens] for tokens in emitted]),
            produced=tuple(n + len(t) for n, t in zip(rows.produced, emitted, strict=True)),
            newest=found.bonus,
        )
        return BatchStep(after, tuple(emitted), ones, ones)


def launch(model: TwoTower, rows: VerifiedRows) -> Judged:
    """One round: a draft (one NFE) and one context pass over it, which gives the accepted tokens and a bonus token.

    The first place of a block is the newest token, which is decided but not absorbed yet, so that one context pass both
    absorbs it and verifies the rest. The first round has no such token and drafts every place.
    """
    return judge(model, rows, propose_draft(model, rows))


def propose_draft(model: TwoTower, rows: VerifiedRows) -> Draft:
    """One denoising step over [newest | masks]: each place's draft depends only on the context and the newest token."""
    device = model.denoiser_device
    widths = rows.widths
    size = max(widths)
    block = torch.full((len(widths), size), model.config.mask_token_id, device=device)
    num_known = 1 if rows.newest else 0
    if rows.newest:
        block[:, 0] = to_device(rows.newest, device)
    level = tuple((w - num_known) / w for w in widths)
    ragged = widths if min(widths) < size else None
    seed = model.seed(rows.context)
    logits = model.denoiser_logits(block, seed, level, ragged)
    logits = logits.to(model.context_device)
    # a draft may be drawn from anything that is settled before it; settings of the request make it likelier to be kept
    shaped = rows.shaping.apply_to_blocks(logits, num_known)
    if rows.settings.all_greedy:
        ops = model.context_tower.logit_ops
        ids, probabilities = greedy_tokens(ops.argmax(logits), shaped, ops), None
    else:
        probabilities = distribution(logits, rows.settings, shaped)
        ids = inverse_sample(probabilities, _table(rows, _DRAFT, widths, size))
    if num_known:
        ids[:, 0] = block[:, 0].to(model.context_device)
    return Draft(ids, probabilities)


def judge(model: TwoTower, rows: VerifiedRows, draft: Draft) -> Judged:
    """Launches the context tower's pass over the draft and the decision.

    Greedy rows keep the prefix that equals its argmax. Others accept x with probability min(1, p/q), and at a rejection
    sample from the normalised positive part of p − q. Rows with a constraint, penalties or bad words of several tokens
    wait here for the draft's ids, because what may come at a place depends on those before it.
    """
    num_known = 1 if rows.newest else 0
    scored = model.score(draft.ids, rows.context)
    logits = model.scored_logits(scored)  # (b, s, v): position i predicts place i + 1
    if num_known:
        first = logits[:, :1]  # a placeholder: the newest token is accepted anyway
    else:
        assert rows.context.next_logits is not None
        first = rows.context.next_logits.unsqueeze(1)
    own = torch.cat((first, logits), dim=1)  # (b, s+1, v): own[:, i] predicts place i
    drafts = draft.ids[:, num_known:].tolist() if rows.shaping.reads_drafts else [()] * len(rows.requests)
    shaped = rows.shaping.apply(own, drafts, num_known)
    ops = model.context_tower.logit_ops
    best = ops.best(own)
    widths, s = rows.widths, draft.ids.shape[1]
    if draft.probabilities is None:
        greedy = greedy_tokens(best.tokens, shaped, ops)  # (b, s+1)
        agrees = draft.ids == greedy[:, :s]
    else:
        p = distribution(own, rows.settings, shaped)
        drafted = draft.ids.unsqueeze(-1)
        ratio = p[:, :s].gather(-1, drafted) / draft.probabilities.gather(-1, drafted).clamp(min=1e-38)
        agrees = _table(rows, _ACCEPT, widths, s) < ratio.squeeze(-1)
    if min(widths) < s:
        places = torch.arange(s, device=agrees.device)
        agrees &= places < to_device(widths, places.device)[:, None]
    if num_known:
        agrees[:, 0] = True
    accepted = agrees.cumprod(-1).sum(-1)  # (b,)
    if draft.probabilities is None:
        emitted = greedy  # equal to the draft as far as that is accepted
    else:
        after = _correction(rows, draft.probabilities, p, accepted, widths)
        emitted = torch.cat((draft.ids, draft.ids[:, :1]), dim=1).scatter(1, accepted[:, None], after[:, None])
    # (b, s+1): the probabilities without the request's settings
    if emitted is best.tokens:
        confidence = (best.logits - best.log_sum).exp()
    else:
        confidence = probability(own, emitted, best.log_sum)
    # the counts go into the same tensor, so that one copy to the host is enough
    found = results(torch.cat((accepted[:, None], emitted), dim=1), F.pad(confidence, (1, 0)))
    tops = likeliest(rows.requests, own, ops)
    return Judged(model, rows, scored, with_tops(found, F.pad(tops, (0, 0, 0, 0, 1, 0))))


def verdict(values: list[Any]) -> Verdict:
    """The decision from `Judged.results`, once they are on the host."""
    numbers, confidences, *_ = values
    counts = tuple(int(row[0]) for row in numbers)
    ids = [[int(i) for i in row[1:]] for row in numbers]
    bonus = tuple(row[count] for row, count in zip(ids, counts, strict=True))
    return Verdict(counts, bonus, ids, [row[1:] for row in confidences])


def _correction(rows: VerifiedRows, q: Tensor, p: Tensor, accepted: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The token after the accepted prefix (b,): from (p − q)⁺ at a rejection, from p after a fully accepted draft."""
    row = torch.arange(len(widths), device=p.device)
    there = p[row, accepted]  # (b, v)
    rejected = accepted < to_device(widths, p.device)
    drafted = q[row, accepted.clamp(max=q.shape[1] - 1)]
    residual = (there - drafted).clamp(min=0)
    # if p = q up to rounding, nothing is left to sample from; such a rejection has probability ~0, and p is the limit
    usable = rejected & (residual.sum(-1) > 0)
    weights = torch.where(usable[:, None], residual, there)
    # The draw is keyed by the token's own position, because two rounds may start at the same one (after a first round
    # that accepts nothing). One is made for every possible count, because the host doesn't know the count yet.
    table = torch.zeros(len(widths), q.shape[1] + 1, dtype=torch.float32)
    for r, (request, n, width) in enumerate(zip(rows.requests, rows.context.lengths, widths, strict=True)):
        if request.temperature > 0:
            table[r, : width + 1] = torch.cat([uniforms(request.seed, n + k, _CORRECT, 1) for k in range(width + 1)])
    draws = to_device(table, p.device).gather(1, accepted[:, None])
    return inverse_sample(weights.unsqueeze(1), draws)[:, 0]


def _width(request: Request, produced: int) -> int:
    """The block's width: S or the adaptive draft's length, less if fewer tokens are left to write; the newest token
    takes one place of it."""
    known = 1 if produced else 0
    most = min(request.block_size, request.draft) if request.params.adaptive_draft else request.block_size
    return max(1, min(most, request.max_new_tokens - produced - 1 + known))


def _next_draft(width: int, num_emitted: int) -> int:
    """The length of the next draft: doubled if all of it was kept, else two more than the tokens that it gave. A
    longer draft would cost both towers arithmetic on tokens that are then rejected."""
    return 2 * width if num_emitted >= width else num_emitted + 2


def _table(rows: VerifiedRows, purpose: int, widths: tuple[int, ...], size: int) -> Tensor:
    """Uniforms (b, size) keyed by each row's seed, its context length and the purpose of the draw."""
    seeds = [r.seed for r in rows.requests]
    table = uniform_table(seeds, rows.context.lengths, (purpose,) * len(widths), widths, size)
    return to_device(table, rows.settings.top_k.device)
