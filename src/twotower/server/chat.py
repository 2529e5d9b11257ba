"""POST /v1/chat/completions."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from twotower.checkpoints.chat_template import Turn
from twotower.decoding.output import Generation
from twotower.decoding.scoring import TokenScore
from twotower.server.errors import ApiError
from twotower.server.logprobs import TokenNames, chat_logprobs
from twotower.server.protocol import ChatRequest, Message
from twotower.server.reply import LogprobOptions, ReplyPlan, reply
from twotower.server.service import Service


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """Choices of /v1/chat/completions; a `ReplyFormat`."""

    names: TokenNames
    prefix: str = "chatcmpl"
    object: str = "chat.completion"
    chunk_suffix: str = ".chunk"

    def choice(self, index: int, result: Generation, logprobs: Sequence[TokenScore] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        shown = None if logprobs is None else chat_logprobs(self.names, logprobs)
        return {"index": index, "message": message, "logprobs": shown, "finish_reason": result.finish_reason}

    def beginning(self, index: int, logprobs: Sequence[TokenScore] | None) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunk(self, index: int, text: str, logprobs: Sequence[TokenScore] | None) -> dict[str, Any]:
        shown = None if logprobs is None else chat_logprobs(self.names, logprobs)
        return {"index": index, "delta": {"content": text}, "logprobs": shown, "finish_reason": None}

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": result.finish_reason}


async def chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Writes the next message of a chat `n` times. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    n, includes_usage = body.num_choices, body.includes_usage
    request.state.log["user"] = body.user
    if body.top_logprobs is not None and not body.logprobs:
        message = "top_logprobs needs logprobs: true; set it or leave top_logprobs out"
        raise ApiError(400, message, param="top_logprobs", code="invalid_value")
    with ExitStack() as held:
        admission = held.enter_context(service.admit(n))
        prompt = rendered(service, body.messages)
        # no special tokens: templates write the control tokens that a prompt begins with
        requests = await service.prepare(prompt, body, body.most_tokens, num_choices=n, special=False)
        logprobs = LogprobOptions(body.top_logprobs or 0) if body.logprobs else None
        plan = ReplyPlan(tuple(requests), 1, ChatFormat(service.names), logprobs, includes_usage)
        return await reply(service, request, plan, bool(body.stream), admission, held)


def rendered(service: Service, messages: Sequence[Message]) -> str:
    """The prompt that the chat template makes of messages; it holds the control tokens that a prompt begins with.

    Raises ApiError without a template, and where it refuses the messages.
    """
    if service.template is None:
        message = f"{service.model_name!r} has no chat template; use /v1/completions, or serve a chat model"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    try:
        return service.template.render([Turn(m.role, m.text) for m in messages])
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error
