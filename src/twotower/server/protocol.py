"""The bodies of the requests that the server takes.

Types are checked here. Ranges are checked by `SamplingParams`, so that every entrance of the library gives the same
error; here they are only written into the OpenAPI schema.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from twotower.decoding.modes import CONSTRAINED_MODES, Mode
from twotower.decoding.params import MAX_BLOCK, CommitRule, SamplingParams
from twotower.server.errors import ApiError

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_ALTERNATIVES = 20

# Settings of OpenAI's protocol that this server does not support, with the values that mean "not used": those are
# accepted, and any other value is refused as an unknown field is.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "parallel_tool_calls": (),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
}

# fail_fast: a list of 100,000 wrong entries gives one error, not 100,000.
_Entry = TypeVar("_Entry")
_Many = Annotated[list[_Entry], Field(fail_fast=True)]


def _shown(**keywords: Any) -> Any:
    """Keywords of JSON Schema that are only written into the OpenAPI schema and not checked by pydantic."""
    return Field(json_schema_extra=keywords)


_Count = Annotated[int, _shown(minimum=1)]
_BlockCount = Annotated[int, _shown(minimum=1, maximum=MAX_BLOCK)]
_Tokens = Annotated[int, _shown(minimum=0)]
_Stop = Annotated[str, _shown(minLength=1, maxLength=MAX_STOP_CHARACTERS)]


class _Strict(BaseModel):
    """Refuses unknown fields, and converts no types: a number in quotes is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, raw: Any) -> Any:
        """Drops all unknown fields but the first: a body of 100,000 unknown fields gives one error."""
        if not isinstance(raw, dict):
            return raw
        known = {name: value for name, value in raw.items() if name in cls.model_fields}
        first = next(((k, v) for k, v in raw.items() if k not in known), None)
        return known if first is None else known | dict([first])


class StreamOptions(_Strict):
    """`include_usage` ends a stream with a chunk that has the usage and no choices."""

    include_usage: bool = False


class JsonSchema(_Strict):
    """A JSON schema with a name. It is always followed strictly, whatever `strict` says."""

    name: str
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(_Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class Sampling(_Strict):
    """How to decode; `None` is the default. At most one of `response_format`, `regex` and `grammar` may be given."""

    temperature: Annotated[float, _shown(minimum=0, maximum=100)] | None = None
    top_p: Annotated[float, _shown(exclusiveMinimum=0, maximum=1)] | None = None
    seed: Annotated[int, _shown(minimum=0, exclusiveMaximum=2**63)] | None = None
    stop: _Stop | Annotated[_Many[_Stop], _shown(maxItems=MAX_STOPS)] | None = None
    mode: Mode | None = None
    block_size: _BlockCount | None = None
    steps_per_block: _BlockCount | None = None
    confidence_threshold: Annotated[float, _shown(minimum=0, maximum=1)] | None = None
    commit_rule: CommitRule | None = None
    top_k: _Count | None = None
    ignore_eos: bool | None = None
    allow_loss: bool | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    regex: Annotated[str, _shown(minLength=1, format="regex")] | None = None
    grammar: Annotated[str, _shown(minLength=1, format="lark")] | None = None

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
        if len(stop) > MAX_STOPS or any(len(s) > MAX_STOP_CHARACTERS for s in stop):
            message = f"stop must be at most {MAX_STOPS} strings of at most {MAX_STOP_CHARACTERS} characters"
            raise ApiError(400, message, param="stop", code="invalid_value")
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
            "top_p": self.top_p,
            "seed": None if self.seed is None else self.seed + choice,
        }
        constrained = any(given[name] is not None for name in ("json_schema", "regex", "grammar"))
        fitting: Mode = "ar" if constrained and default_mode not in CONSTRAINED_MODES else default_mode
        return SamplingParams(
            mode=self.mode or fitting,
            max_new_tokens=max_new_tokens,
            temperature=default_temperature if self.temperature is None else self.temperature,
            stop=tuple(stop),
            past_positions=True,  # --max-context says how long a text may be
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )


class Settings(Sampling):
    """The fields that completions and chats share. `user` is only written to the log."""

    model: str
    n: _Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unused(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {k: v for k, v in raw.items() if k not in _UNUSED or not _is_unused(k, v)}

    @property
    def num_choices(self) -> int:
        """How many texts to write for each prompt. Raises ApiError if that is less than one."""
        n = 1 if self.n is None else self.n
        if n < 1:
            raise ApiError(400, f"n is {n}, must be at least 1", param="n", code="invalid_value")
        return n

    @property
    def includes_usage(self) -> bool:
        """Whether the stream ends with its usage. Raises ApiError for `stream_options` without `stream`."""
        if self.stream_options is None:
            return False
        if not self.stream:
            message = "stream_options are only for stream: true; leave them out"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        return self.stream_options.include_usage


_Texts = Annotated[_Many[str], _shown(minItems=1)]
_Ids = Annotated[_Many[_Tokens], _shown(minItems=1)]


class CompletionRequest(Settings):
    """POST /v1/completions. `logprobs` n asks for each token's log-probability and those of the n likeliest tokens."""

    prompt: str | _Texts | _Ids | Annotated[_Many[_Ids], _shown(minItems=1)]
    max_tokens: _Tokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: bool | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, also where the request has only one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "prompt is an empty list, must have a text or token ids", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | _Many[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Settings):
    """POST /v1/chat/completions."""

    messages: Annotated[_Many[Message], Field(min_length=1)]
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The limit of new tokens under either of its two names. Raises ApiError where both are given."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "max_tokens and max_completion_tokens are the same setting; give one of them"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class WatchRequest(Sampling):
    """POST /twotower/watch: one text with all its steps, which continues a prompt or answers messages."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    prompt: str | None = None
    messages: Annotated[_Many[Message], Field(min_length=1)] | None = None
    max_tokens: _Tokens | None = None


def _is_unused(name: str, value: Any) -> bool:
    # In Python True == 1 and False == 0; in JSON they differ.
    return value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in _UNUSED[name])
