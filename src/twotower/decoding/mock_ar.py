"""Mode `mock_ar`: the released code's two-tower AR. The denoiser reads the last token, without time modulation, from
the context state before that token; then the context tower absorbs the token. Letters: b rows."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower.decoding.likeliest import likeliest, read_top, with_tops
from twotower.decoding.output import Token
from twotower.decoding.sampling import propose, results, temper, uniform_table
from twotower.decoding.shaping import Shaping, shaping
from twotower.decoding.step import BatchStep, Request, RowBatch
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device


@dataclasses.dataclass(frozen=True)
class MockArRows(RowBatch):
    """Rows whose context holds all their tokens except the `newest` (b)."""

    newest: tuple[int, ...]
    shaping: Shaping


def context_ids(request: Request) -> tuple[int, ...]:
    """The ids that the context must hold when the request starts: all except the last token."""
    return (request.prompt_ids + request.produced)[:-1]


def start(model: TwoTower, requests: tuple[Request, ...], context: ContextState) -> MockArRows:
    """Rows whose `context_ids` are absorbed."""
    settings = temper(tuple(r.params for r in requests), model.config.vocab_size, model.denoiser_device)
    newest = tuple((r.prompt_ids + r.produced)[-1] for r in requests)
    return MockArRows(requests, context, settings, newest, shaping(model, requests, model.denoiser_device))


class _MockArStep(NamedTuple):
    """A step before its results are read: `results` (2 + m, b, 1) hold each row's next token, its probability and
    the numbers of `likeliest`; `rows` have absorbed the token before it."""

    rows: MockArRows
    results: Tensor

    def finish(self, values: list[Any]) -> BatchStep:
        numbers, confidences, *tops = values
        ids = tuple(int(i) for [i] in numbers)
        ones = (1,) * len(ids)
        tokens = tuple(
            (Token(i, 0, c, *read_top(tops, row, 0, self.rows.requests[row].params.logprobs)),)
            for row, (i, [c]) in enumerate(zip(ids, confidences, strict=True))
        )
        after = dataclasses.replace(self.rows, newest=ids, shaping=self.rows.shaping.after([[i] for i in ids]))
        return BatchStep(after, tokens, ones, ones)


def launch(model: TwoTower, rows: MockArRows) -> _MockArStep:
    """One token per row."""
    newest = torch.tensor(rows.newest).unsqueeze(1)  # (b, 1)
    seed = model.seed(rows.context)
    logits = model.denoiser_logits(to_device(newest, model.denoiser_device), seed, None)
    draws = None
    if not rows.settings.all_greedy:
        seeds, ones = [r.seed for r in rows.requests], (1,) * len(rows.requests)
        places = [n + 1 for n in rows.context.lengths]
        draws = to_device(uniform_table(seeds, places, (0,) * len(ones), ones, 1), model.denoiser_device)
    shaped = rows.shaping.apply(logits, [()] * len(rows.requests))
    ops = model.denoiser_tower.logit_ops
    proposal = propose(logits, rows.settings, draws, ops, shaped)
    found = with_tops(results(*proposal), likeliest(rows.requests, logits, proposal.tokens, ops))
    context = model.absorb(to_device(newest, model.context_device), rows.context, with_logits=False)
    return _MockArStep(dataclasses.replace(rows, context=context), found)
