"""POST /v1/responses."""

from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from twotower.decoding.params import SamplingParams
from twotower.server.chat import prepare_chat
from twotower.server.dialect import reply_as
from twotower.server.responses.protocol import ResponsesRequest
from twotower.server.responses.writer import ResponseWriter
from twotower.server.service import Service


async def respond(service: Service, body: ResponsesRequest, request: Request) -> Response:
    """Writes what comes next after the items of a request. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    request.state.log["user"] = body.user
    with ExitStack() as held:
        admission = held.enter_context(service.admit(1))
        chat = await prepare_chat(service, body.chat())
        [text] = chat.requests
        echo = _echo(body, text.params, service.model_name)
        writer = ResponseWriter(echo, len(text.prompt_ids), lambda thought: _count(service, thought))
        return await reply_as(service, request, chat, writer, bool(body.stream), admission, held)


def _count(service: Service, text: str) -> int:
    return len(service.tokenizer.encode(text, add_special_tokens=False).ids)


def _echo(body: ResponsesRequest, params: SamplingParams, model: str) -> dict[str, Any]:
    """What a response says of its request; clients insist on most of it."""
    asked = body.model_dump(exclude_none=True, by_alias=True, include={"text", "tool_choice", "tools", "reasoning"})
    return {
        "model": model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **asked.get("reasoning", {})},
        "store": False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}, **asked.get("text", {})},
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked.get("tools", []),
        "top_p": 1.0 if params.top_p is None else params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
