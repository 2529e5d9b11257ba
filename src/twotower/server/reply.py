"""What a completion and a chat answer have in common: tokens in, several texts out, whole or in chunks."""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from typing import Any, NamedTuple, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from twotower.decoding.output import Generation, Token
from twotower.decoding.params import SamplingParams
from twotower.server.errors import ApiError
from twotower.server.logprobs import ScoredToken, Scorer, committed
from twotower.server.service import Choice, Places, Service
from twotower.server.streaming import EventStream, unless_gone


class Wanted(NamedTuple):
    """Which log-probabilities to give: of the `num_top` likeliest tokens beside the chosen one; `echo` those of the
    prompt too."""

    num_top: int
    echo: bool = False

    @property
    def by_scoring(self) -> bool:
        """Whether they come from a pass of the context tower over the whole text, and not from decoding."""
        return self.num_top > 0 or self.echo


class ReplyFormat(Protocol):
    """How an endpoint writes its answer."""

    @property
    def prefix(self) -> str: ...

    @property
    def object(self) -> str: ...

    @property
    def chunk_suffix(self) -> str: ...

    def choice(self, index: int, result: Generation, logprobs: Sequence[ScoredToken] | None) -> dict[str, Any]:
        """A whole choice."""
        ...

    def beginning(self, index: int, logprobs: Sequence[ScoredToken] | None) -> list[dict[str, Any]]:
        """The choices of chunks before any text is written; the log-probabilities are those of an echoed prompt."""
        ...

    def chunk(self, index: int, text: str, logprobs: Sequence[ScoredToken] | None) -> dict[str, Any]:
        """A chunk's choice."""
        ...

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        """The last chunk's choice."""
        ...


class Order(NamedTuple):
    """A checked request: texts to write, in which shape, and what goes with them."""

    choices: tuple[Choice, ...]
    num_prompts: int
    shape: ReplyFormat
    wanted: Wanted | None
    includes_usage: bool

    def usage(self, results: Sequence[Generation]) -> dict[str, int]:
        """Tokens and calls of all texts; a prompt counts once however many texts follow it."""
        per_prompt = len(self.choices) // self.num_prompts
        prompt = sum(len(choice.prompt_ids) for choice in self.choices[::per_prompt])
        new = sum(result.stats.num_tokens for result in results)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "denoiser_calls": sum(result.stats.denoiser_calls for result in results),
            "context_calls": sum(result.stats.context_calls for result in results),
        }


def check_logprobs(order: Order) -> None:
    """Raises ApiError for log-probabilities that can't be given."""
    if order.wanted is None or not order.wanted.by_scoring:
        return
    if not order.wanted.echo and not all(_is_context_towers(choice.params) for choice in order.choices):
        message = (
            "the likeliest other tokens are known in modes ar and verified, or with echo; ask for those or for none"
        )
        raise ApiError(400, message, param="logprobs", code="invalid_value")


def _is_context_towers(params: SamplingParams) -> bool:
    """Whether the text is distributed as the context tower says."""
    return params.mode in ("ar", "verified") or (params.mode == "auto" and not params.allow_loss)


async def answer(
    service: Service, request: Request, order: Order, stream: bool, places: Places, held: ExitStack
) -> Response:
    """The response to an order. A stream takes over what `held` holds, its places among it, until it has ended."""
    check_logprobs(order)
    for choice in order.choices:
        await service.check(choice)
    head = {
        "id": f"{order.shape.prefix}-{secrets.token_hex(12)}",
        "object": order.shape.object + (order.shape.chunk_suffix if stream else ""),
        "created": int(time.time()),
        "model": service.config.model_name,
    }
    log = request.state.log
    log |= {"id": head["id"], "mode": order.choices[0].params.mode, "texts": len(order.choices)}
    if stream:
        return EventStream(_chunks(service, order, places, head, log), held.pop_all(), done="[DONE]")
    return JSONResponse(await unless_gone(request, _whole(service, order, places, head, log)))


async def _whole(
    service: Service, order: Order, places: Places, head: dict[str, Any], log: dict[str, Any]
) -> dict[str, Any]:
    """The body of an answer that is no stream."""
    results: dict[int, Generation] = {}
    tokens: dict[int, list[Token]] = {i: [] for i in range(len(order.choices))}
    async with aclosing(service.run(order.choices, places, log)) as events:
        async for index, event in events:
            tokens[index] += event.tokens
            if event.result is not None:
                results[index] = event.result
    choices = []
    for i, choice in enumerate(order.choices):
        logprobs = None
        if order.wanted is not None:
            logprobs = committed(tokens[i])
            if order.wanted.by_scoring:
                scorer = _scorer(service, choice, order.wanted)
                scored = await _score(service, scorer, [*choice.prompt_ids, *results[i].token_ids])
                logprobs = scored if order.wanted.echo else scored[len(choice.prompt_ids) :]
        choices.append(order.shape.choice(i, results[i], logprobs))
    usage = order.usage([results[i] for i in range(len(choices))])
    log |= usage
    return head | {"choices": choices, "usage": usage}


async def _chunks(
    service: Service, order: Order, places: Places, head: dict[str, Any], log: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream: text as it is settled, then why each text ended, then the usage if it is wanted."""
    if order.includes_usage:
        head = head | {"usage": None}
    shape = order.shape
    results: dict[int, Generation] = {}
    scorers: list[Scorer] = []
    for i, choice in enumerate(order.choices):
        prompt = None
        if order.wanted is not None and order.wanted.by_scoring:
            scorers.append(_scorer(service, choice, order.wanted))
            prompt = await _score(service, scorers[i], choice.prompt_ids)
        for beginning in shape.beginning(i, prompt if order.wanted is not None and order.wanted.echo else None):
            yield head | {"choices": [beginning]}
    async with aclosing(service.run(order.choices, places, log)) as events:
        async for index, event in events:
            logprobs = None if order.wanted is None else committed(event.tokens)
            if scorers:
                logprobs = await _score(service, scorers[index], event.token_ids)
            if event.text or logprobs:
                yield head | {"choices": [shape.chunk(index, event.text, logprobs)]}
            if event.result is not None:
                results[index] = event.result
                yield head | {"choices": [shape.end(index, event.result)]}
    usage = order.usage([results[i] for i in range(len(order.choices))])
    log |= usage
    if order.includes_usage:
        yield head | {"choices": [], "usage": usage}


def _scorer(service: Service, choice: Choice, wanted: Wanted) -> Scorer:
    return Scorer(service.engine.model, wanted.num_top, len(choice.prompt_ids) + choice.params.max_new_tokens)


async def _score(service: Service, scorer: Scorer, ids: Sequence[int]) -> list[ScoredToken]:
    """The log-probabilities of a text's next tokens by a pass of the context tower; one pass runs at a time."""
    cancelled = threading.Event()
    async with service.scoring:
        try:
            return await asyncio.to_thread(scorer.push, ids, cancelled)
        finally:
            cancelled.set()
