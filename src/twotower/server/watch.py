"""POST /twotower/watch: one text and how it came to be, an event for every step. The page lives on it."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from typing import Any, get_args

from fastapi import Request
from fastapi.responses import Response

from twotower.decoding.output import BlockView, Generation, Token
from twotower.decoding.params import Mode
from twotower.server.protocol import WatchRequest
from twotower.server.service import Choice, Places, Service
from twotower.server.streaming import EventStream

# New tokens of a request that does not say how many, or as many as the context has room for.
_MAX_TOKENS = 128


def about(service: Service) -> dict[str, Any]:
    """What a page needs to know before it asks for texts."""
    return {
        "model": service.config.model_name,
        "modes": list(get_args(Mode)),
        "default_mode": service.config.default_mode,
        "block_size": service.engine.model.config.block_size,
        "max_context": service.config.max_context,
    }


async def watch(service: Service, body: WatchRequest, request: Request) -> Response:
    """Streams the steps of one text. Raises ApiError for what can't be done."""
    with ExitStack() as held:
        places = held.enter_context(service.admit(1))
        ids = await service.encode(body.prompt)
        room = service.room(ids, body.max_tokens, _MAX_TOKENS)
        choice = Choice(ids, body.sampling(service.config.default_mode, room))
        await service.check(choice)
        request.state.log |= {"mode": choice.params.mode, "prompt_tokens": len(ids)}
        return EventStream(_steps(service, choice, places, request.state.log), held.pop_all())


async def _steps(
    service: Service, choice: Choice, places: Places, log: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """An event per step: seconds since the start, the tokens it committed, and the block that it left unfinished."""
    began = time.perf_counter()
    async with aclosing(service.run([choice], places, log, watch=True)) as events:
        async for _, event in events:
            step: dict[str, Any] = {
                "seconds": round(time.perf_counter() - began, 4),
                "tokens": _tokens(service, event.tokens),
                # a finished block's tokens have come already
                "block": None if event.tokens or event.block is None else _block(service, event.block),
            }
            if event.result is not None:
                step["result"] = _result(event.result)
            yield step


def _tokens(service: Service, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [{"text": service.names.text(t.id), "step": t.step, "confidence": round(t.confidence, 4)} for t in tokens]


def _block(service: Service, block: BlockView) -> dict[str, Any]:
    """Each place's token, None where it is masked, and the probability that it had when it was fixed."""
    mask = service.engine.model.config.mask_token_id
    places = [
        None if i == mask else {"text": service.names.text(i), "confidence": round(c, 4)}
        for i, c in zip(block.ids, block.confidences, strict=True)
    ]
    return {"step": block.step, "places": places}


def _result(result: Generation) -> dict[str, Any]:
    stats = result.stats
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "num_tokens": stats.num_tokens,
        "denoiser_calls": stats.denoiser_calls,
        "context_calls": stats.context_calls,
        "seconds_to_first_token": round(stats.seconds_to_first_token, 4),
        "seconds_total": round(stats.seconds_total, 4),
    }
