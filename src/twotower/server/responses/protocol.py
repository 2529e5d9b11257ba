"""The body of /v1/responses, and the chat that it asks for."""

from typing import Annotated, Any, Literal

from pydantic import Field

from twotower.server.fields import Integer, Many, Strict, shown
from twotower.server.protocol import ChatRequest, StreamOptions, TemplateVariables
from twotower.server.responses.items import InputItem, chat_messages
from twotower.server.sampling import Sampling
from twotower.server.structure import JsonSchema, ObjectFormat, SchemaFormat, TextFormat
from twotower.server.tool_request import AllowedTools, Function, FunctionName, NamedTool, Tool, ToolSubset


class FlatSchema(JsonSchema):
    """JSON that a schema describes."""

    type: Literal["json_schema"]


class TextForm(Strict):
    """The form of the answer."""

    format: Annotated[TextFormat | ObjectFormat | FlatSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Strict):
    """How much the model thinks, as far as its template knows of it. Reasoning is never summed up, only shown."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class FunctionTool(Function):
    """A function that the model may call."""

    type: Literal["function"]


class FlatNamedTool(FunctionName):
    """The function that must be called, or one that may be."""

    type: Literal["function"]

    def of_chat(self) -> NamedTool:
        """The same in the form of chats."""
        return NamedTool(type="function", function=FunctionName(name=self.name))


class FlatToolSubset(Strict):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Many[FlatNamedTool], Field(min_length=1)]

    def of_chat(self) -> ToolSubset:
        """The same in the form of chats."""
        allowed = AllowedTools(mode=self.mode, tools=[tool.of_chat() for tool in self.tools])
        return ToolSubset(type="allowed_tools", allowed_tools=allowed)


_ToolChoice = Annotated[FlatNamedTool | FlatToolSubset, Field(discriminator="type")]


class ResponsesRequest(Sampling, TemplateVariables):
    """POST /v1/responses. Responses are not kept, whatever `store` says. `metadata` comes back with the response."""

    model: str | None = None
    input: str | Many[InputItem]
    instructions: str | None = None
    max_output_tokens: Annotated[Integer, shown(minimum=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextForm | None = None
    reasoning: ReasoningConfig | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: Many[Literal["reasoning.encrypted_content"]] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None

    def chat(self) -> ChatRequest:
        """The chat that this request asks for. Raises ApiError for an item that can't be read."""
        fields = {name: getattr(self, name) for name in self.model_fields_set & ChatRequest.model_fields.keys()}
        fields |= {"messages": chat_messages(self.instructions, self.input), "max_tokens": self.max_output_tokens}
        if self.reasoning is not None and self.reasoning.effort is not None:
            fields.setdefault("reasoning_effort", self.reasoning.effort)
            if self.reasoning.effort == "none":
                fields["chat_template_kwargs"] = {"enable_thinking": False, **(self.chat_template_kwargs or {})}
        format = None if self.text is None else self.text.format
        if format is not None:
            fields["response_format"] = format
        if isinstance(format, FlatSchema):
            fields["response_format"] = SchemaFormat(type="json_schema", json_schema=format)
        if self.tools is not None:
            fields["tools"] = [Tool(type="function", function=tool) for tool in self.tools]
        if isinstance(self.tool_choice, FlatNamedTool | FlatToolSubset):
            fields["tool_choice"] = self.tool_choice.of_chat()
        return ChatRequest.model_construct(**fields)
