"""POST /v1/messages and POST /v1/messages/count_tokens."""

import secrets
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from twotower.decoding.output import Generation
from twotower.decoding.step import Request as TextRequest
from twotower.engine.aio import Admission, EngineFailed
from twotower.server.anthropic.protocol import MessagesRequest
from twotower.server.chat import render
from twotower.server.errors import anthropic_body
from twotower.server.fields import logged
from twotower.server.reply import Counts
from twotower.server.service import Service
from twotower.server.streaming import EventStream, unless_gone


async def messages(service: Service, body: MessagesRequest, request: Request) -> Response:
    """Writes the next message of a conversation. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    log = request.state.log
    user = (body.metadata or {}).get("user_id")
    log["user"] = logged(user) if isinstance(user, str) else None
    with ExitStack() as held:
        admission = held.enter_context(service.admit(1))
        chat = body.chat()
        prompt = render(service, chat.messages, chat)
        [text] = await service.prepare(prompt, chat, chat.max_tokens, special=bool(chat.add_special_tokens))
        head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.model_name,
        }
        log |= {"id": head["id"], "mode": text.params.mode, "texts": 1}
        if body.stream:
            return EventStream(_events(service, text, admission, head, log), held.pop_all(), named=True)
        return JSONResponse(await unless_gone(request, _whole(service, text, admission, head, log)))


async def count_tokens(service: Service, body: MessagesRequest) -> dict[str, int]:
    """How many tokens a conversation is for the model. Raises ApiError for what can't be read."""
    service.check_model(body.model)
    chat = body.chat()
    ids = await service.tokens(render(service, chat.messages, chat), special=bool(chat.add_special_tokens))
    return {"input_tokens": len(ids)}


async def _whole(
    service: Service, text: TextRequest, admission: Admission, head: dict[str, Any], log: dict[str, Any]
) -> dict[str, Any]:
    """The body of a reply that is not streamed."""
    result = None
    async with aclosing(service.run([text], admission, log)) as outputs:
        async for _, output in outputs:
            result = output.result
    assert result is not None, "the last output has the result"
    usage = _usage(text, Counts.of(result))
    log |= usage
    content = [{"type": "text", "text": result.text}] if result.text else []
    return head | {"content": content} | _stop(result) | {"usage": usage}


async def _events(
    service: Service, text: TextRequest, admission: Admission, head: dict[str, Any], log: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream: the message without content, its block in pieces, why it ended, and the usage."""
    start = head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(text, Counts())}
    yield {"type": "message_start", "message": start}
    yield {"type": "ping"}
    is_open = False
    result = None
    try:
        async with aclosing(service.run([text], admission, log)) as outputs:
            async for _, output in outputs:
                if output.text and not is_open:
                    is_open = True
                    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
                if output.text:
                    delta = {"type": "text_delta", "text": output.text}
                    yield {"type": "content_block_delta", "index": 0, "delta": delta}
                result = output.result
    except EngineFailed as error:
        yield anthropic_body(503, str(error))
        return
    assert result is not None, "the last output has the result"
    if is_open:
        yield {"type": "content_block_stop", "index": 0}
    usage = _usage(text, Counts.of(result))
    log |= usage
    yield {"type": "message_delta", "delta": _stop(result), "usage": usage}
    yield {"type": "message_stop"}


def _stop(result: Generation) -> dict[str, Any]:
    """Why the message ended."""
    reason = "max_tokens" if result.finish_reason == "length" else "stop_sequence" if result.stop_string else "end_turn"
    return {"stop_reason": reason, "stop_sequence": result.stop_string}


def _usage(text: TextRequest, counts: Counts) -> dict[str, int]:
    """Tokens and calls; unlike OpenAI's, the tokens of the input are without those that were cached."""
    return {
        "input_tokens": len(text.prompt_ids) - counts.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.tokens,
        "denoiser_calls": counts.denoiser_calls,
        "context_calls": counts.context_calls,
    }
