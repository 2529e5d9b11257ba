"""The items that a response continues, as the messages of a chat."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict

from twotower.server.errors import ApiError
from twotower.server.fields import Many
from twotower.server.messages import Message, Open, Part, Role, read_content, read_result

_REFERENCE = "item_reference"


_SHAPES = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": ("summary",),
}


def _shape(kind: str, required: Sequence[str]) -> dict[str, Any]:
    types = {"role": {}, "content": {}, "summary": {"type": "array", "items": {"$ref": "#/components/schemas/Part"}}}
    properties = {"type": {"enum": [kind]}} | {name: types.get(name, {"type": "string"}) for name in required}
    return {"properties": properties, "required": ["type", *required]}


class InputItem(Open):
    """A message, a call of a function or what it gave, or reasoning, as clients write them and as responses have them.

    What is known of them depends on `type`, and other keys are for bookkeeping.
    """

    model_config = ConfigDict(json_schema_extra={"anyOf": [_shape(kind, keys) for kind, keys in _SHAPES.items()]})

    type: str = "message"
    role: Role | None = None
    content: str | Many[Part | str] | None = None


def chat_messages(instructions: str | None, given: str | Sequence[InputItem]) -> list[Message]:
    """The messages of a chat, of which `instructions` are the first or, where that is of the system, begin it.

    Everything that the model said in turn is one message. Raises ApiError for what is no text.
    """
    items = [InputItem(role="user", content=given)] if isinstance(given, str) else given
    said: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        one = _message(item, f"input.{i}")
        if one["role"] == "assistant" and said and said[-1]["role"] == "assistant":
            _join(said[-1], one)
        else:
            said.append(one)
    if instructions is not None and said[0]["role"] in ("system", "developer"):
        said[0]["content"] = f"{instructions}\n{said[0]['content']}"
    elif instructions is not None:
        said.insert(0, {"role": "system", "content": instructions})
    return [Message.model_validate(one) for one in said]


def _message(item: InputItem, place: str) -> dict[str, Any]:
    more = item.model_extra or {}
    if item.type == "message":
        if item.role is None:
            raise ApiError(400, f"{place}.role is missing", param=f"{place}.role", code="missing_required_parameter")
        text, thoughts = read_content(item.content, f"{place}.content")
        return {"role": item.role, "content": text} | ({"reasoning_content": thoughts} if thoughts else {})
    if item.type == "function_call":
        function = {"name": _text(more, "name", place), "arguments": more.get("arguments")}
        call = {"id": _text(more, "call_id", place), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if item.type == "function_call_output":
        content = read_result(more.get("output"), f"{place}.output")
        return {"role": "tool", "content": content, "tool_call_id": _text(more, "call_id", place)}
    if item.type == "reasoning":
        parts = item.content if item.content else more.get("summary")
        thoughts = read_result(_plain(parts), place)  # empty where they are encrypted
        return {"role": "assistant", "content": ""} | ({"reasoning_content": thoughts} if thoughts else {})
    if item.type == _REFERENCE:
        remedy = "send the item itself, as clients do with store: false"
        message = f"{place} refers to an item of an earlier response, and this server keeps none; {remedy}"
        raise ApiError(400, message, param=place, code="unsupported_content")
    kind = json.dumps(item.type[:40], ensure_ascii=False)
    message = f"{place} is an item of type {kind}, which this server can't read; leave it out"
    raise ApiError(400, message, param=place, code="unsupported_content")


def _plain(parts: Any) -> Any:
    """The parts of reasoning as parts of a text."""
    if not isinstance(parts, list):
        return parts
    texts = [part.model_dump() if isinstance(part, Part) else part for part in parts]
    return [{**one, "type": "text"} if isinstance(one, dict) else one for one in texts]


def _join(last: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds to a message of the assistant what it said next."""
    last["content"] = "\n".join(filter(None, (last["content"], more["content"])))
    if "reasoning_content" in more:
        last["reasoning_content"] = "\n".join(filter(None, (last.get("reasoning_content"), more["reasoning_content"])))
    if "tool_calls" in more:
        last.setdefault("tool_calls", []).extend(more["tool_calls"])


def _text(keys: dict[str, Any], name: str, place: str) -> str:
    value, where = keys.get(name), f"{place}.{name}"
    if value is None:
        raise ApiError(400, f"{where} is missing", param=where, code="missing_required_parameter")
    if not isinstance(value, str):
        raise ApiError(400, f"{where} must be a text", param=where, code="invalid_value")
    return value
