"""POST /v1/chat/completions."""

import asyncio
import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import Response

from twotower.checkpoints.chat_template import Turn
from twotower.decoding.constraint import check_constraint
from twotower.decoding.output import Generation, TokenScore
from twotower.decoding.params import SamplingParams
from twotower.decoding.step import Request as TextRequest
from twotower.errors import SettingError
from twotower.server.answers import AnswerFormat, Reading
from twotower.server.errors import ApiError, in_json
from twotower.server.logprobs import chat_logprobs
from twotower.server.messages import Message, turns
from twotower.server.protocol import ChatRequest, Templating
from twotower.server.reasoning import AtStart, Thought, thought_at_start
from twotower.server.reply import LogprobOptions, ReplyPlan, reply
from twotower.server.service import Service
from twotower.server.structure import Structure
from twotower.server.token_names import TokenNames
from twotower.server.tool_request import ToolUse
from twotower.server.tool_turns import knows_tools, told, with_short_ids
from twotower.server.tools.calls import Call
from twotower.server.tools.grammar import arguments_schema


class ChatFormat:
    """Choices of /v1/chat/completions; a `ReplyFormat`."""

    prefix, object, chunk_suffix = "chatcmpl", "chat.completion", ".chunk"

    def __init__(self, names: TokenNames, answers: AnswerFormat) -> None:
        self._names = names
        self._answers = answers
        self._readings: dict[int, Reading] = {}
        self._num_streamed: dict[int, int] = {}

    def choice(
        self,
        index: int,
        result: Generation,
        logprobs: Sequence[TokenScore] | None,
        echoed: Sequence[TokenScore] | None,
    ) -> dict[str, Any]:
        assert result.text is not None
        reading = self._reading(index)
        parts = reading.push(result.text) + reading.end()
        content = "".join(part for part in parts if isinstance(part, str))
        calls = [_tool_call(part) for part in parts if isinstance(part, Call)]
        message = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if self._answers.thoughts is not None:
            message |= _thought("".join(part.text for part in parts if isinstance(part, Thought)) or None)
        return {
            "index": index,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": None if logprobs is None else chat_logprobs(self._names, logprobs),
            "finish_reason": self._finish_reason(index, result),
        }

    def beginning(self, index: int, echoed: Sequence[TokenScore] | None) -> list[dict[str, Any]]:
        return [_chunk(index, {"role": "assistant", "content": ""})]

    def chunk(
        self, index: int, text: str, logprobs: Sequence[TokenScore] | None, more: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        chunks = self._chunks(index, self._reading(index).push(text))
        if logprobs is None and not more:
            return chunks
        shown = None if logprobs is None else chat_logprobs(self._names, logprobs)
        first, *others = chunks or [_chunk(index, {"content": ""})]
        return [first | {"logprobs": shown, **more}, *others]

    def end(self, index: int, result: Generation) -> list[dict[str, Any]]:
        rest = self._chunks(index, self._reading(index).end())  # first: the last call may be sure only now
        return [*rest, _chunk(index, {}) | {"finish_reason": self._finish_reason(index, result)}]

    def _reading(self, index: int) -> Reading:
        if index not in self._readings:
            self._readings[index] = self._answers.reading()
        return self._readings[index]

    def _chunks(self, index: int, parts: Sequence[Thought | str | Call]) -> list[dict[str, Any]]:
        chunks = []
        for part in parts:
            if isinstance(part, str):
                chunks.append(_chunk(index, {"content": part}))
            elif isinstance(part, Thought):
                chunks.append(_chunk(index, _thought(part.text)))
            else:
                place = self._num_streamed.get(index, 0)
                self._num_streamed[index] = place + 1
                begun = _tool_call(part._replace(arguments=""))
                argued = {"function": {"arguments": part.arguments}}
                chunks += [_chunk(index, {"tool_calls": [{"index": place, **delta}]}) for delta in (begun, argued)]
        return chunks

    def _finish_reason(self, index: int, result: Generation) -> str:
        called = self._reading(index).num_calls > 0
        return "tool_calls" if called and result.finish_reason == "stop" else result.finish_reason


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _thought(text: str | None) -> dict[str, Any]:
    """Reasoning under DeepSeek's name, which most clients read, and vLLM's."""
    return {"reasoning_content": text, "reasoning": text}


def _tool_call(call: Call) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call._asdict()}


async def chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Writes the next message of a chat `n` times. Raises ApiError for what can't be done."""
    service.check_model(body.model)
    request.state.log["user"] = body.user
    n, written = body.num_choices, body.num_written
    if body.top_logprobs and not body.logprobs:
        message = "top_logprobs needs logprobs: true; set it or leave top_logprobs out"
        raise ApiError(400, message, param="top_logprobs", code="invalid_value")
    with ExitStack() as held:
        admission = held.enter_context(service.admit(written))
        prepared = await prepare_chat(service, body)
        logprobs = LogprobOptions(body.num_top) if body.logprobs else None
        plan = ReplyPlan(
            prepared.requests,
            1,
            n,
            ChatFormat(service.token_names(body.skip_special_tokens), prepared.answers),
            logprobs,
            body.stream_options,
            body.prompt_logprobs,
            bool(body.return_token_ids),
        )
        return await reply(service, request, plan, bool(body.stream), admission, held)


class PreparedChat(NamedTuple):
    """The texts to write for a chat, and how to read them."""

    requests: tuple[TextRequest, ...]
    answers: AnswerFormat


async def prepare_chat(service: Service, body: ChatRequest) -> PreparedChat:
    """Checks a chat and makes its prompt. Raises ApiError and SettingError for what can't be done."""
    prompt = render(service, body.messages, body)
    tools = body.tool_use
    structure, start = _structure(service, body, tools), _thought_at_start(service, body, prompt)
    answers = AnswerFormat(
        service.control,
        service.tool_marks,
        tools,
        None if body.separate_reasoning is False else service.thoughts,
        start == "open",
        body.include_reasoning is not False,
    )
    if structure is not None:
        structure = await asyncio.to_thread(service.behind_thought, structure, start)
    settings = body.model_copy(update={"skip_special_tokens": False}) if answers.shows_control else body
    # no special tokens by default: templates write the control tokens that a prompt begins with
    special, count = bool(body.add_special_tokens), body.num_written
    try:
        requests = await service.prepare(
            prompt, settings, body.most_tokens, num_choices=count, special=special, structure=structure
        )
    except ApiError as error:
        if tools is not None and structure is not None and error.param == structure.field:
            await asyncio.to_thread(_blame_schema, service, body, tools)
        raise
    return PreparedChat(tuple(requests), answers)


def _thought_at_start(service: Service, body: ChatRequest, prompt: str) -> AtStart:
    """Whether the answer begins in the model's reasoning."""
    if service.thoughts is None:
        return "over"
    continued = None
    if _goes_on(body.messages, body):
        [last] = turns(body.messages[-1:], knows_developer=False)
        continued = last.content
    return thought_at_start(service.thoughts, prompt, continued, thinks=body.thinks)


def _goes_on(messages: Sequence[Message], asked: Templating) -> bool:
    """Whether the answer goes on with the last message."""
    return bool(asked.continue_final_message) or any(messages[-1].more.get(k) is True for k in ("prefix", "partial"))


def _structure(service: Service, body: ChatRequest, tools: ToolUse | None) -> Structure | None:
    """What the answer must match: calls, if one must be made, and else what the body says. An answer that may be a call
    follows its `response_format` only if it is none."""
    given = body.structure()
    if tools is None:
        return given
    if tools.must:
        if given is not None and given.field != "response_format":
            message = f"{given.field} can't be given where tool_choice demands a call; leave one of them out"
            raise ApiError(400, message, param=given.field, code="invalid_value")
        choice = body.model_dump(include={"tool_choice"})["tool_choice"]
        return Structure("grammar", service.tool_grammar(tools), "tool_choice", choice)
    if given is not None and given.field == "response_format":
        return given._replace(kind="grammar", text=service.tool_grammar(tools, json.loads(given.text)))
    return given


def _blame_schema(service: Service, body: ChatRequest, tools: ToolUse) -> None:
    """Raises ApiError for the first function of which no call can be held to the schema of its parameters."""
    for i, tool in enumerate(body.tools or ()):
        schema = tools.functions.get(tool.function.name)
        if schema is None:
            continue
        try:
            text = json.dumps(arguments_schema(schema))
            check_constraint(service.engine.model, SamplingParams(mode="ar", json_schema=text))
        except SettingError as error:
            place = f"tools.{i}.function.parameters"
            raise ApiError(400, in_json(place, schema, error), param=place, code="invalid_value") from error


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
    goes_on, role = _goes_on(messages, asked), messages[-1].role
    if goes_on and role != "assistant":
        message = f"continue_final_message goes on with an assistant's message, and the last one is of role {role}"
        raise ApiError(400, message, param="continue_final_message", code="invalid_value")
    if goes_on and asked.add_generation_prompt:
        message = "add_generation_prompt and continue_final_message exclude each other; leave one of them out"
        raise ApiError(400, message, param="continue_final_message", code="invalid_value")
    variables = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", asked.reasoning_effort)
    said: Sequence[Turn] = turns(messages, knows_developer=template.reads("developer"))
    if knows_tools(template):
        said, tools = with_short_ids(said, template), asked.shown_tools or None
    else:
        said, tools = told(said, asked.shown_tools, service.tool_marks.format), None
    try:
        return template.render(
            said,
            goes_on,
            tools=tools,
            documents=asked.documents,
            generation_prompt=asked.add_generation_prompt is not False,
            variables=variables,
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error
