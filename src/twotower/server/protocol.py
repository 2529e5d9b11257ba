"""The bodies of the requests that the server takes.

Types are checked here. Ranges are checked by `SamplingParams`, so that every entrance of the library gives the same
error; here they are only written into the OpenAPI schema.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from twotower.server.errors import ApiError
from twotower.server.fields import Body, Integer, Many, Strict, shown
from twotower.server.messages import Message
from twotower.server.sampling import Sampling
from twotower.server.tool_request import Tool, ToolSettings

_Count = Annotated[Integer, shown(minimum=1)]
_Tokens = Annotated[Integer, shown(minimum=0)]
_Id = Annotated[Integer, shown(minimum=0)]
_Alternatives = Annotated[Integer, Field(ge=0, le=20)]


class StreamOptions(Strict):
    """`include_usage` ends a stream with a chunk that has the usage and no choices; with `continuous_usage_stats` every
    chunk has the usage so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Settings(Sampling):
    """The fields that completions and chats share. `user` is only written to the log, cut."""

    model: str | None = None
    n: _Count | None = None
    best_of: _Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    max_tokens: Annotated[Integer, shown(minimum=-1)] | None = None
    prompt_logprobs: _Alternatives | None = None
    return_token_ids: bool | None = None

    @field_validator("max_tokens", "max_completion_tokens", check_fields=False)
    @classmethod
    def _no_limit(cls, value: int | None) -> int | None:
        """None for -1, which means no limit to some clients. Raises ApiError for any other negative number."""
        return None if value == -1 else value

    @property
    def num_choices(self) -> int:
        """How many texts to write for each prompt. Raises ApiError if that is less than one."""
        n = 1 if self.n is None else self.n
        if n < 1:
            raise ApiError(400, f"n is {n}, must be at least 1", param="n", code="invalid_value")
        return n

    @property
    def num_written(self) -> int:
        """How many texts are written for each prompt; the `n` likeliest are given. Raises ApiError for too few."""
        if self.best_of is None:
            return self.num_choices
        if self.best_of < self.num_choices or (self.stream and self.best_of > self.num_choices):
            rule = f"{self.num_choices}, n, in a stream" if self.stream else f"at least n, {self.num_choices}"
            message = f"best_of is {self.best_of}, must be {rule}"
            raise ApiError(400, message, param="best_of", code="invalid_value")
        return self.best_of


_Texts = Annotated[Many[str], shown(minItems=1)]
_Ids = Annotated[Many[_Id], shown(minItems=1)]


class CompletionRequest(Settings):
    """POST /v1/completions. `logprobs` n asks for each token's log-probability and those of the n likeliest tokens."""

    prompt: str | _Texts | _Ids | Annotated[Many[_Ids], shown(minItems=1)] = ""
    logprobs: _Alternatives | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none_asked(cls, value: Any) -> Any:
        return None if value is False else value

    @property
    def num_top(self) -> int:
        return self.logprobs or 0

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, also where the request has only one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "prompt is an empty list, must have a text or token ids", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TemplateVariables(Body):
    """What a request with messages says of its template.

    The answer goes on with the last message, an assistant's, if `continue_final_message`. `chat_template_kwargs` are
    variables of the template, and `documents` texts to answer from that it may write into the prompt.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Many[dict[str, Any]] | None = None
    reasoning_effort: str | None = None

    @property
    def thinks(self) -> bool:
        """Whether the variables of the template leave the model's reasoning on."""
        given = self.chat_template_kwargs or {}
        return not any(given.get(name) is False for name in ("enable_thinking", "thinking"))


class Templating(TemplateVariables):
    """What a request with messages says of its template, and the tools that it may write into the prompt."""

    tools: Many[Tool] | None = None

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the template sees."""
        return [tool.shown for tool in self.tools or ()]


class ChatRequest(Settings, ToolSettings, Templating):
    """POST /v1/chat/completions. Without `separate_reasoning` the model's reasoning stays in the content, without
    `include_reasoning` it is left out."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Integer, shown(minimum=-1)] | None = None
    logprobs: bool | None = None
    top_logprobs: _Alternatives | None = None
    add_special_tokens: bool | None = None
    separate_reasoning: bool | None = None
    include_reasoning: bool | None = None

    @property
    def num_top(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else 0

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        return [] if self.tool_choice == "none" else super().shown_tools

    @property
    def most_tokens(self) -> int | None:
        """The limit of new tokens; where both of its names are given, both limits hold."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits, default=None)


class WatchRequest(Sampling, Templating):
    """POST /twotower/watch: one text with all its steps, which continues a prompt or answers messages."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    prompt: str | None = None
    messages: Annotated[Many[Message], Field(min_length=1)] | None = None
    max_tokens: _Tokens | None = None


class TokenizeRequest(Templating):
    """POST /tokenize: the token ids of a prompt, or of messages by the chat template."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Many[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize: the text of token ids."""

    model: str | None = None
    tokens: Many[_Id]
