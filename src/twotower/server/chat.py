"""POST /v1/chat/completions."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from twotower.decoding.output import Generation
from twotower.decoding.scoring import TokenScore
from twotower.server.errors import ApiError
from twotower.server.fields import logged
from twotower.server.logprobs import chat_logprobs
from twotower.server.messages import Message, turns
from twotower.server.protocol import ChatRequest, Templating
from twotower.server.reply import LogprobOptions, ReplyPlan, reply
from twotower.server.service import Service
from twotower.server.token_names import TokenNames


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

    def chunk(
        self, index: int, text: str, logprobs: Sequence[TokenScore] | None, more: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        shown = None if logprobs is None else chat_logprobs(self.names, logprobs)
        return [{"index": index, "delta": {"content": text}, "logprobs": shown, "finish_reason": None, **more}]

    def end(self, index: int, result: Generation) -> list[dict[str, Any]]:
        return [{"index": index, "delta": {}, "logprobs": None, "finish_reason": result.finish_reason}]


async def chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Writes the next message of a chat `n` times. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    request.state.log["user"] = logged(body.user)
    n, written = body.num_choices, body.num_written
    if body.top_logprobs and not body.logprobs:
        message = "top_logprobs needs logprobs: true; set it or leave top_logprobs out"
        raise ApiError(400, message, param="top_logprobs", code="invalid_value")
    with ExitStack() as held:
        admission = held.enter_context(service.admit(written))
        prompt = render(service, body.messages, body)
        # no special tokens by default: templates write the control tokens that a prompt begins with
        special = bool(body.add_special_tokens)
        requests = await service.prepare(prompt, body, body.most_tokens, num_choices=written, special=special)
        logprobs = LogprobOptions(body.num_top) if body.logprobs else None
        plan = ReplyPlan(
            tuple(requests),
            1,
            n,
            ChatFormat(service.names),
            logprobs,
            body.stream_options,
            body.prompt_logprobs,
            bool(body.return_token_ids),
        )
        return await reply(service, request, plan, bool(body.stream), admission, held)


def render(service: Service, messages: Sequence[Message], asked: Templating) -> str:
    """The prompt that the chat template makes of messages; it holds the control tokens that a prompt begins with.

    Raises ApiError without a template, and where it refuses the messages.
    """
    template = service.template
    if template is None:
        message = (
            f"{service.model_name!r} has no chat template; use /v1/completions, serve a chat model, or give "
            "--chat-template, or a chat_template.jinja in the checkpoint's folder"
        )
        raise ApiError(400, message, param="messages", code="no_chat_template")
    last = messages[-1]
    goes_on = bool(asked.continue_final_message) or any(last.more.get(key) is True for key in ("prefix", "partial"))
    if goes_on and last.role != "assistant":
        message = f"continue_final_message goes on with an assistant's message, and the last one is of role {last.role}"
        raise ApiError(400, message, param="continue_final_message", code="invalid_value")
    if goes_on and asked.add_generation_prompt:
        message = "add_generation_prompt and continue_final_message exclude each other; leave one of them out"
        raise ApiError(400, message, param="continue_final_message", code="invalid_value")
    variables = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", asked.reasoning_effort)
    try:
        return template.render(
            turns(messages, knows_developer=template.reads("developer")),
            goes_on,
            documents=asked.documents,
            generation_prompt=asked.add_generation_prompt is not False,
            variables=variables,
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error
