"""Mode `ar`: the context tower alone, one token at a time. Letters: b rows, v vocabulary."""

import dataclasses
from typing import Any, NamedTuple

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
class ArRows(RowBatch):
    """Rows whose context holds all their tokens except the `newest` (b), which is empty before the first tokens."""

    shaping: Shaping
    newest: tuple[int, ...] = ()

    @property
    def joins(self) -> bool:
        return bool(self.newest)


def context_ids(request: Request) -> tuple[int, ...]:
    """The ids that the context must hold when the request starts: all except the newest produced token, if any."""
    return request.prompt_ids + request.produced[:-1]


def start(model: TwoTower, requests: tuple[Request, ...], context: ContextState) -> ArRows:
    """Rows whose `context_ids` are absorbed; either all of them have produced tokens or none has."""
    settings = temper(tuple(r.params for r in requests), model.config.vocab_size, model.context_device)
    newest = tuple(r.produced[-1] for r in requests if r.produced)
    assert len(newest) in (0, len(requests))
    return ArRows(requests, context, settings, shaping(model, requests, model.context_device), newest)


class _ArStep(NamedTuple):
    """A step before its results are read: `results` (2 + m, b, 1) hold each row's next token, its probability and
    the numbers of `likeliest`; `rows` have absorbed the token before it."""

    rows: ArRows
    results: Tensor

    def finish(self, values: list[Any]) -> BatchStep:
        rows, (numbers, confidences, *tops) = self.rows, values
        ids = [int(i) for [i] in numbers]
        absorbed = (1 if rows.newest else 0,) * len(rows.requests)
        return BatchStep(
            dataclasses.replace(rows, newest=tuple(ids), shaping=rows.shaping.after([[i] for i in ids])),
            tuple(
                (Token(i, 0, c, *read_top(tops, row, 0, rows.requests[row].params.logprobs)),)
                for row, (i, [c]) in enumerate(zip(ids, confidences, strict=True))
            ),
            (0,) * len(rows.requests),
            absorbed,
        )


def launch(model: TwoTower, rows: ArRows) -> _ArStep:
    """Absorbs the newest token of each row, then samples the next from the context tower's logits."""
    context = rows.context
    if rows.newest:
        newest = to_device(rows.newest, model.context_device).unsqueeze(1)
        context = model.absorb(newest, context, with_logits=True)
    assert context.next_logits is not None
    draws = None
    if not rows.settings.all_greedy:
        # the draw is keyed by the token's position, so that a resumed row repeats it
        seeds, ones = [r.seed for r in rows.requests], (1,) * len(rows.requests)
        draws = to_device(uniform_table(seeds, context.lengths, (0,) * len(ones), ones, 1), model.context_device)
    logits = context.next_logits.unsqueeze(1)  # (b, 1, v)
    shaped = rows.shaping.apply(logits, [()] * len(rows.requests))
    ops = model.context_tower.logit_ops
    proposal = propose(logits, rows.settings, draws, ops, shaped)
    found = with_tops(results(*proposal), likeliest(rows.requests, logits, proposal.tokens, ops))
    return _ArStep(dataclasses.replace(rows, context=context), found)
