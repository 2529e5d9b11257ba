"""The messages of a chat as clients send them, and the turns that a template sees.

Clients send their own and the server's answers back as they have them: with nulls, with keys that are for bookkeeping,
with content in parts. What a message says is text; whatever else it has is given on to the template.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from twotower.checkpoints.chat_template import Turn
from twotower.server.errors import ApiError
from twotower.server.fields import Many

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

# Kinds of parts that are text -> the key that has it.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Kinds of parts that are the model's reasoning.
_REASONING_PARTS = ("thinking", "reasoning")
# Keys of a message that aren't for templates: the client's bookkeeping, and what becomes part of something else.
_DROPPED = (
    *("id", "refusal", "annotations", "audio", "function_call", "provider_specific_fields", "thinking_blocks"),
    *("reasoning_details", "cache_control", "prefix", "partial", "status", "object", "images", "metadata"),
)


class Open(BaseModel):
    """Nulls are absent, and unknown keys are kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, raw: Any) -> Any:
        return {key: value for key, value in raw.items() if value is not None} if isinstance(raw, dict) else raw


class Part(Open):
    """A part of a message's content; only text can be read."""

    type: str


class Message(Open):
    """One turn of a chat. Keys that are not known here reach the template."""

    role: Role
    content: str | Many[Part | str] | None = None

    @property
    def more(self) -> dict[str, Any]:
        """The keys beside role and content."""
        return dict(self.model_extra or {})


def turns(messages: Sequence[Message], *, knows_developer: bool) -> list[Turn]:
    """The messages as a template sees them.

    Content in parts is one text, its parts on lines of their own as in other servers. `developer`, OpenAI's later name
    of `system`, stays only where the template knows it. Raises ApiError for what is no text.
    """
    return [_turn(message, f"messages.{i}", knows_developer) for i, message in enumerate(messages)]


def _turn(message: Message, place: str, knows_developer: bool) -> Turn:
    more = message.more
    text, reasoning = read_content(message.content, f"{place}.content")
    if not text and isinstance(more.get("refusal"), str):
        text = more["refusal"]
    calls = _tool_calls(more.get("tool_calls"), more.get("function_call"), place)
    if message.role not in ("assistant", "tool", "function") and message.content is None:
        raise ApiError(400, f"{place}.content is missing", param=f"{place}.content", code="missing_required_parameter")
    kept = {key: value for key, value in more.items() if key not in (*_DROPPED, "tool_calls") and value not in ([], {})}
    if calls:
        kept["tool_calls"] = calls
    if reasoning:
        kept.setdefault("reasoning_content", reasoning)
    role: str = {"developer": "developer" if knows_developer else "system", "function": "tool"}.get(
        message.role, message.role
    )
    return Turn(role, text, kept)


def read_content(
    content: str | Sequence[Part | str] | None, place: str, without: Collection[str] = ()
) -> tuple[str, str]:
    """A message's text and its reasoning. Parts of the types `without` are passed over.

    Raises ApiError for any other part that is neither.
    """
    if content is None or isinstance(content, str):
        return content or "", ""
    texts, thoughts = [], []
    for i, part in enumerate(content):
        where = f"{place}.{i}"
        if isinstance(part, str):
            texts.append(part)
        elif part.type in without:
            continue
        elif part.type in _REASONING_PARTS:
            thoughts.append(_text(part, part.type if part.type in (part.model_extra or {}) else "text", where))
        elif part.type in _TEXT_PARTS:
            texts.append(_text(part, _TEXT_PARTS[part.type], where))
        else:
            kind = json.dumps(part.type[:40], ensure_ascii=False)
            message = f"{where} is a part of type {kind}, and this model reads only text; leave it out"
            raise ApiError(400, message, param=where, code="unsupported_content")
    return "\n".join(texts), "\n".join(thoughts)


def read_result(content: Any, place: str) -> str:
    """The text of a call's result, which may be in parts. What is neither is shown as JSON."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else "" if content is None else json.dumps(content)
    parts = [Part(**one) if isinstance(one, dict) and isinstance(one.get("type"), str) else str(one) for one in content]
    return read_content(parts, place)[0]


def _text(part: Part, key: str, where: str) -> str:
    value = (part.model_extra or {}).get(key)
    if isinstance(value, list):  # reasoning may have parts itself
        value = "".join(str(one.get("text", "")) for one in value if isinstance(one, dict))
    if not isinstance(value, str):
        raise ApiError(400, f"{where}.{key} must be a text", param=f"{where}.{key}", code="invalid_value")
    return value


def _tool_calls(calls: Any, function_call: Any, place: str) -> list[dict[str, Any]]:
    """The calls of an assistant's message, with arguments as objects, as templates expect them.

    OpenAI's form has the arguments as a text of JSON; a text that is none stays one. Raises ApiError for a call
    without a function's name.
    """
    if isinstance(function_call, dict) and not calls:  # OpenAI's form before there were several calls
        calls = [{"type": "function", "function": function_call}]
    if calls is None:
        return []
    name = f"{place}.tool_calls"
    if not isinstance(calls, list):
        raise ApiError(400, f"{name} must be a list", param=name, code="invalid_value")
    return [_tool_call(call, f"{name}.{i}") for i, call in enumerate(calls)]


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        message = f"{place}.function.name is missing"
        raise ApiError(400, message, param=f"{place}.function.name", code="missing_required_parameter")
    return {**call, "function": {**function, "arguments": arguments(function.get("arguments"))}}


def arguments(given: Any) -> Any:
    """The arguments of a call as an object, where they are a text of JSON with one; as they are where they aren't."""
    if given is None or given == "":
        return {}
    if not isinstance(given, str):
        return given
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return found if isinstance(found, Mapping) else given
