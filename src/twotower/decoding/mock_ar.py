"""Mode `mock_ar`: the released code's two-tower AR. The denoiser reads the last token, without time modulation, from
the context state before that token; then the context tower absorbs the token. Letters: b rows."""

import dataclasses
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from twotower.decoding.output import BlockView, Token
from twotower.decoding.sampling import Temper, propose, results, temper, uniforms
from twotower.decoding.step import BatchStep, Request
from twotower.model.state import ContextState, join
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device


@dataclasses.dataclass(frozen=True)
class MockArRows:
    """Rows whose context holds all tokens but the `newest` (b) of each."""

    requests: tuple[Request, ...]
    context: ContextState
    settings: Temper
    newest: tuple[int, ...]

    @property
    def rests(self) -> tuple[bool, ...]:
        return (True,) * len(self.requests)

    @property
    def joins(self) -> bool:
        return True

    def select(self, rows: list[int]) -> Self:
        requests = tuple(self.requests[r] for r in rows)
        return dataclasses.replace(
            self,
            requests=requests,
            context=self.context.select(rows),
            settings=self.settings.select(rows),
            newest=tuple(self.newest[r] for r in rows),
        )

    def join(self, others: Self) -> Self:
        return dataclasses.replace(
            self,
            requests=self.requests + others.requests,
            context=join((self.context, others.context)),
            settings=self.settings.join(others.settings),
            newest=self.newest + others.newest,
        )

    def view(self, row: int) -> BlockView | None:
        return None


def context_ids(request: Request) -> tuple[int, ...]:
    """What the context tower holds when the request starts: all but the last token."""
    return (request.prompt_ids + request.produced)[:-1]


def start(model: TwoTower, requests: tuple[Request, ...], context: ContextState) -> MockArRows:
    """Rows whose `context_ids` are absorbed."""
    settings = temper(tuple(r.params for r in requests), model.config.vocab_size, model.denoiser_device)
    return MockArRows(requests, context, settings, tuple((r.prompt_ids + r.produced)[-1] for r in requests))


class _MockArStep(NamedTuple):
    """`results` are those of each row's next token, (2, b); `rows` have absorbed the newest one of each."""

    rows: MockArRows
    results: Tensor

    def finish(self, values: list[Any]) -> BatchStep:
        numbers, confidences = values
        ids = tuple(int(i) for i in numbers)
        ones = (1,) * len(ids)
        tokens = tuple((Token(i, 0, c),) for i, c in zip(ids, confidences, strict=True))
        return BatchStep(dataclasses.replace(self.rows, newest=ids), tokens, ones, ones)


def launch(model: TwoTower, rows: MockArRows) -> _MockArStep:
    """One token per row."""
    newest = torch.tensor(rows.newest).unsqueeze(1)  # (b, 1)
    seed = rows.context.to(model.denoiser_device)
    logits = model.denoiser_logits(to_device(newest, model.denoiser_device), seed, None)
    draws = None
    if not rows.settings.all_greedy:
        pairs = zip(rows.requests, rows.context.lengths, strict=True)
        draws = to_device(torch.stack([uniforms(r.seed, n + 1, 0, 1) for r, n in pairs]), model.denoiser_device)
    proposal = propose(logits, rows.settings, draws, model.denoiser_tower.logit_ops)
    context = model.absorb(to_device(newest, model.context_device), rows.context, with_logits=False)
    found = results(proposal.tokens[:, 0], proposal.confidence[:, 0])
    return _MockArStep(dataclasses.replace(rows, context=context), found)
