"""The body of /v1/messages, and the chat that it asks for."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from twotower.server.errors import ApiError
from twotower.server.fields import Integer, Many, Strict, shown
from twotower.server.messages import Message, Part, read_content, read_result
from twotower.server.protocol import ChatRequest, TemplateVariables
from twotower.server.sampling import MAX_STOP_CHARACTERS, MAX_STOPS, Sampling
from twotower.server.structure import JsonSchema, SchemaFormat
from twotower.server.tool_request import Function, FunctionName, NamedTool, Tool

_StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class AnthropicMessage(Message):
    """One turn: a text, or blocks of text, of thinking, of calls and of their results."""

    role: Literal["user", "assistant", "system"]
    content: str | Many[Part | str]


class Thinking(Strict):
    """Whether the model thinks before it answers; "adaptive" leaves it to the model. How long it thinks is not
    bounded by `budget_tokens`, only with its answer by `max_tokens`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Integer | None = None
    display: str | None = None


class HeldThread(Strict):
    """Anthropic's servers hold a conversation that is begun with "create", so that "continue" sends only what is new.
    This one holds none, and clients send everything again when it says so."""

    type: Literal["create", "continue"]
    previous_message_id: str | None = None


class OutputSchema(Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    """The form of the answer."""

    effort: str | None = None
    format: OutputSchema | None = None


class CustomTool(Function):
    """A function that the model may call; `input_schema` is the JSON schema of its arguments."""

    type: Literal["custom"] = "custom"
    parameters: Annotated[dict[str, Any] | None, Field(alias="input_schema")] = None


class CustomChoice(Strict):
    """Whether the answer may call functions or, for "any" and "tool", must; "tool" has the `name` of one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def of_chat(self) -> Literal["none", "auto", "required"] | NamedTool:
        """The choice in the form of chats. Raises ApiError where the name is missing."""
        if self.type != "tool":
            return "required" if self.type == "any" else self.type
        if self.name is None:
            place = "tool_choice.name"
            raise ApiError(400, f"{place} is missing", param=place, code="missing_required_parameter")
        return NamedTool(type="function", function=FunctionName(name=self.name))


class MessagesRequest(Sampling, TemplateVariables):
    """POST /v1/messages and /v1/messages/count_tokens. Of `metadata`, `user_id` is written to the log, cut."""

    model: str | None = None
    messages: Annotated[Many[AnthropicMessage], Field(min_length=1)]
    system: str | Many[Part | str] | None = None
    max_tokens: Annotated[Integer, shown(minimum=0)] | None = None
    stop_sequences: Annotated[Many[_StopSequence], Field(max_length=MAX_STOPS)] | None = None
    tools: Many[CustomTool] | None = None
    tool_choice: CustomChoice | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    thinking: Thinking | None = None
    thread: HeldThread | None = None
    output_config: OutputConfig | None = None

    def chat(self) -> ChatRequest:
        """The chat that this request asks for. Raises ApiError for a block that can't be read.

        An assistant's message at the end is the beginning of the answer.
        """
        fields = {name: getattr(self, name) for name in self.model_fields_set & ChatRequest.model_fields.keys()}
        said = _chat_messages(self.system, self.messages)
        variables = dict(self.chat_template_kwargs or {})
        if self.thinking is not None and self.thinking.type != "adaptive":
            variables.setdefault("enable_thinking", self.thinking.type == "enabled")
        fields |= {"messages": said, "chat_template_kwargs": variables}
        if self.tools is not None:
            fields["tools"] = [Tool(type="function", function=tool) for tool in self.tools]
        if self.tool_choice is not None:
            fields["tool_choice"] = self.tool_choice.of_chat()
            fields["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if said[-1].role == "assistant":
            fields["continue_final_message"] = True
        if self.stop_sequences:
            own = [self.stop] if isinstance(self.stop, str) else self.stop or []
            fields["stop"] = [*own, *self.stop_sequences]
        if self.output_config is not None and self.output_config.effort is not None:
            fields.setdefault("reasoning_effort", self.output_config.effort)
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "answer", "schema": self.output_config.format.json_schema}
            fields["response_format"] = SchemaFormat(type="json_schema", json_schema=JsonSchema.model_validate(schema))
        return ChatRequest.model_construct(**fields)


def _chat_messages(system: str | Sequence[Part | str] | None, messages: Sequence[AnthropicMessage]) -> list[Message]:
    """The messages of the chat. Several of one role in turn are one message, which many templates insist on."""
    said = [Message(role="system", content=read_content(system, "system")[0])] if system else []
    for i, message in enumerate(messages):
        for one in _parts(message, f"messages.{i}.content"):
            last = said[-1] if said else one
            if last is not one and last.role == one.role and not last.more and not one.more:
                said[-1] = Message(role=last.role, content=f"{last.content}\n{one.content}")
            else:
                said.append(one)
    return said


def _parts(message: AnthropicMessage, place: str) -> list[Message]:
    """One turn as messages of a chat: the results of calls first, each a message of its own, then what is said."""
    blocks = [] if isinstance(message.content, str) else message.content
    made: list[Message] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        if isinstance(block, str):
            continue
        given = block.model_extra or {}
        if block.type == "tool_result":
            content = read_result(given.get("content"), f"{place}.{i}.content")
            result = {"role": "tool", "content": content, "tool_call_id": given.get("tool_use_id")}
            made.append(Message.model_validate(result))
        elif block.type == "tool_use":
            if not isinstance(given.get("name"), str):
                where = f"{place}.{i}.name"
                raise ApiError(400, f"{where} is missing", param=where, code="missing_required_parameter")
            function = {"name": given["name"], "arguments": given.get("input")}
            calls.append({"id": given.get("id"), "type": "function", "function": function})
    text, thoughts = read_content(message.content, place, without=("tool_result", "tool_use", "redacted_thinking"))
    if text or calls or not made:
        more = {"tool_calls": calls or None, "reasoning_content": thoughts or None}
        made.append(Message.model_validate({"role": message.role, "content": text, **more}))
    return made
