"""The bodies of the requests that the server takes.

Types are checked here. Ranges are checked by `SamplingParams`, so that every entrance of the library gives the same
error; here they are only written into the OpenAPI schema.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from twotower.decoding.modes import CONSTRAINED_MODES, Mode
from twotower.decoding.params import MAX_BLOCK, CommitRule, SamplingParams
from twotower.server.errors import ApiError
from twotower.server.fields import Body, Integer, Many, Strict
from twotower.server.messages import Message

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_ALTERNATIVES = 20
_STOP_RULE = f"a text of 1 to {MAX_STOP_CHARACTERS} characters, or a list of at most {MAX_STOPS} such texts"


def _shown(**keywords: Any) -> Any:
    """Keywords of JSON Schema that are only written into the OpenAPI schema and not checked by pydantic."""
    return Field(json_schema_extra=keywords)


_Count = Annotated[Integer, _shown(minimum=1)]
_BlockCount = Annotated[Integer, _shown(minimum=1, maximum=MAX_BLOCK)]
_Tokens = Annotated[Integer, _shown(minimum=0)]
_Id = Annotated[int, _shown(minimum=0)]
_Stop = Annotated[str, _shown(minLength=1, maxLength=MAX_STOP_CHARACTERS)]


class StreamOptions(Strict):
    """`include_usage` ends a stream with a chunk that has the usage and no choices; with `continuous_usage_stats` every
    chunk has the usage so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchema(Strict):
    """A JSON schema with a name. It is always followed strictly, whatever `strict` says."""

    name: str
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class Sampling(Body):
    """How to decode; `None` is the default. At most one of `response_format`, `regex` and `grammar` may be given."""

    temperature: Annotated[float, _shown(minimum=0, maximum=100)] | None = None
    top_p: Annotated[float, _shown(minimum=0, maximum=1)] | None = None
    seed: Annotated[Integer, _shown(minimum=-1, exclusiveMaximum=2**63)] | None = None
    stop: _Stop | Annotated[Many[_Stop], _shown(maxItems=MAX_STOPS)] | None = None
    mode: Mode | None = None
    block_size: _BlockCount | None = None
    steps_per_block: _BlockCount | None = None
    confidence_threshold: Annotated[float, _shown(minimum=0, maximum=1)] | None = None
    commit_rule: CommitRule | None = None
    top_k: Annotated[Integer, _shown(minimum=-1)] | None = None
    ignore_eos: bool | None = None
    allow_loss: bool | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    regex: Annotated[str, _shown(minLength=1, format="regex")] | None = None
    grammar: Annotated[str, _shown(minLength=1, format="lark")] | None = None

    @field_validator("top_k", "seed")
    @classmethod
    def _off(cls, value: int | None, info: ValidationInfo) -> int | None:
        """None for the numbers by which clients say that a setting is off."""
        return None if value == -1 or (value == 0 and info.field_name == "top_k") else value

    @property
    def json_schema(self) -> str | None:
        """The text of the JSON schema that `response_format` asks for, None for free text."""
        if isinstance(self.response_format, SchemaFormat):
            return json.dumps(self.response_format.json_schema.json_schema, ensure_ascii=False)
        return '{"type": "object"}' if isinstance(self.response_format, ObjectFormat) else None

    def sampling(
        self, default_mode: Mode, max_new_tokens: int, choice: int = 0, default_temperature: float = 1.0
    ) -> SamplingParams:
        """The settings of one text, number `choice` of its prompt. Raises SettingError for a value out of range.

        The texts of one prompt use the seeds `seed`, `seed` + 1, and so on. A constrained request that names no mode
        uses `ar` if the default mode can't follow constraints.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOPS or not all(0 < len(one) <= MAX_STOP_CHARACTERS for one in stop):
            raise ApiError(400, f"stop must be {_STOP_RULE}", param="stop", code="invalid_value")
        given = {
            "block_size": self.block_size,
            "steps_per_block": self.steps_per_block,
            "confidence_threshold": self.confidence_threshold,
            "commit_rule": self.commit_rule,
            "ignore_eos": self.ignore_eos,
            "allow_loss": self.allow_loss,
            "json_schema": self.json_schema,
            "regex": self.regex,
            "grammar": self.grammar,
            "top_k": self.top_k,
            "top_p": self.top_p or None,
            "seed": None if self.seed is None else self.seed + choice,
        }
        constrained = any(given[name] is not None for name in ("json_schema", "regex", "grammar"))
        fitting: Mode = "ar" if constrained and default_mode not in CONSTRAINED_MODES else default_mode
        temperature = default_temperature if self.temperature is None else self.temperature
        if self.top_p == 0:
            temperature = 0.0  # of the likeliest tokens that have no probability together only the first is left
        return SamplingParams(
            mode=self.mode or fitting,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=tuple(stop),
            past_positions=True,  # --max-context says how long a text may be
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )


class Settings(Sampling):
    """The fields that completions and chats share. `user` is only written to the log, cut."""

    model: str | None = None
    n: _Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    max_tokens: Annotated[Integer, _shown(minimum=-1)] | None = None

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


_Texts = Annotated[Many[str], _shown(minItems=1)]
_Ids = Annotated[Many[_Id], _shown(minItems=1)]


class CompletionRequest(Settings):
    """POST /v1/completions. `logprobs` n asks for each token's log-probability and those of the n likeliest tokens."""

    prompt: str | _Texts | _Ids | Annotated[Many[_Ids], _shown(minItems=1)] = ""
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: bool | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none_asked(cls, value: Any) -> Any:
        return None if value is False else value

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, also where the request has only one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "prompt is an empty list, must have a text or token ids", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class Templating(Body):
    """What a request with messages says of its template.

    The answer goes on with the last message, an assistant's, if `continue_final_message`. `chat_template_kwargs` are
    variables of the template, and `documents` texts to answer from that it may write into the prompt.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Many[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


class ChatRequest(Settings, Templating):
    """POST /v1/chat/completions."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Integer, _shown(minimum=-1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    add_special_tokens: bool | None = None

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
