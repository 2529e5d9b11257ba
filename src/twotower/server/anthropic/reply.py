"""POST /v1/messages and POST /v1/messages/count_tokens."""

from contextlib import ExitStack

from fastapi import Request
from fastapi.responses import Response

from twotower.server.anthropic.protocol import MessagesRequest
from twotower.server.anthropic.writer import MessageWriter
from twotower.server.chat import prepare_chat, render
from twotower.server.dialect import reply_as
from twotower.server.errors import ApiError
from twotower.server.service import Service


async def messages(service: Service, body: MessagesRequest, request: Request) -> Response:
    """Writes the next message of a conversation. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    user = (body.metadata or {}).get("user_id")
    request.state.log["user"] = user if isinstance(user, str) else None
    if body.thinking is not None and body.thinking.type == "enabled" and service.thoughts is None:
        message = 'thinking.type is "enabled", and this model marks no reasoning; leave thinking out'
        raise ApiError(400, message, param="thinking.type", code="unsupported_parameter")
    if body.thread is not None and body.thread.type == "continue":
        message = "this server holds no conversations; send all messages"
        raise ApiError(404, message, param="thread", code="thread_not_found")
    with ExitStack() as held:
        admission = held.enter_context(service.admit(1))
        chat = await prepare_chat(service, body.chat())
        writer = MessageWriter(service.model_name, len(chat.requests[0].prompt_ids))
        return await reply_as(service, request, chat, writer, bool(body.stream), admission, held)


async def count_tokens(service: Service, body: MessagesRequest) -> dict[str, int]:
    """How many tokens a conversation is for the model. Raises ApiError for what can't be read."""
    service.check_model(body.model)
    chat = body.chat()
    ids = await service.tokens(render(service, chat.messages, chat), special=bool(chat.add_special_tokens))
    return {"input_tokens": len(ids)}
