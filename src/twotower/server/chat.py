"""POST /v1/chat/completions."""

import secrets
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
from twotower.server.tool_request import ToolUse
from twotower.server.tools.answer import Answer, Marks
from twotower.server.tools.calls import Call


class ChatFormat:
    """Choices of /v1/chat/completions; a `ReplyFormat`. With `tools` their calls are found in the texts."""

    prefix, object, chunk_suffix = "chatcmpl", "chat.completion", ".chunk"

    def __init__(self, names: TokenNames, marks: Marks, tools: ToolUse | None) -> None:
        self._names = names
        self._marks = marks
        self._tools = tools
        self._answers: dict[int, Answer] = {}
        self._num_streamed: dict[int, int] = {}

    def choice(self, index: int, result: Generation, logprobs: Sequence[TokenScore] | None) -> dict[str, Any]:
        assert result.text is not None
        parts = self._parts(index, result.text) + self._parts(index, None)
        content = "".join(part for part in parts if isinstance(part, str))
        calls = [_tool_call(part) for part in parts if isinstance(part, Call)]
        message = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        return {
            "index": index,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": None if logprobs is None else chat_logprobs(self._names, logprobs),
            "finish_reason": self._finish_reason(index, result),
        }

    def beginning(self, index: int, logprobs: Sequence[TokenScore] | None) -> list[dict[str, Any]]:
        return [_chunk(index, {"role": "assistant", "content": ""})]

    def chunk(
        self, index: int, text: str, logprobs: Sequence[TokenScore] | None, more: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        chunks = self._chunks(index, text)
        if logprobs is None and not more:
            return chunks
        shown = None if logprobs is None else chat_logprobs(self._names, logprobs)
        first, *others = chunks or [_chunk(index, {"content": ""})]
        return [first | {"logprobs": shown, **more}, *others]

    def end(self, index: int, result: Generation) -> list[dict[str, Any]]:
        last = _chunk(index, {}) | {"finish_reason": self._finish_reason(index, result)}
        return [*self._chunks(index, None), last]

    def _parts(self, index: int, text: str | None) -> list[str | Call]:
        """What a new piece of a text makes certain, and None, its end."""
        if self._tools is None:
            return [text] if text else []
        if index not in self._answers:
            self._answers[index] = Answer(self._marks, self._tools.functions, one_call=self._tools.one_call)
        answer = self._answers[index]
        return answer.end() if text is None else answer.push(text)

    def _chunks(self, index: int, text: str | None) -> list[dict[str, Any]]:
        chunks = []
        for part in self._parts(index, text):
            if isinstance(part, str):
                chunks.append(_chunk(index, {"content": part}))
                continue
            place = self._num_streamed.get(index, 0)
            self._num_streamed[index] = place + 1
            begun = _tool_call(part._replace(arguments=""))
            argued = {"function": {"arguments": part.arguments}}
            chunks += [_chunk(index, {"tool_calls": [{"index": place, **delta}]}) for delta in (begun, argued)]
        return chunks

    def _finish_reason(self, index: int, result: Generation) -> str:
        called = index in self._answers and self._answers[index].num_calls > 0
        return "tool_calls" if called and result.finish_reason == "stop" else result.finish_reason


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _tool_call(call: Call) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call._asdict()}


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
        tools = body.tool_use
        if tools is not None and tools.must:
            message = 'tool_choice must be "auto" or "none": this server can\'t force a call'
            raise ApiError(400, message, param="tool_choice", code="unsupported_parameter")
        settings = body
        if tools is not None and service.tool_marks.shows_control:
            settings = body.model_copy(update={"skip_special_tokens": False})
        requests = await service.prepare(prompt, settings, body.most_tokens, num_choices=written, special=special)
        logprobs = LogprobOptions(body.num_top) if body.logprobs else None
        plan = ReplyPlan(
            tuple(requests),
            1,
            n,
            ChatFormat(service.names, service.tool_marks, tools),
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
            tools=asked.shown_tools or None,
            documents=asked.documents,
            generation_prompt=asked.add_generation_prompt is not False,
            variables=variables,
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error
