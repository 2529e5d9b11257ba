"""Conversations with tools for chat templates that can't take them as clients have them."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from twotower.checkpoints.chat_template import ChatTemplate, Turn
from twotower.server.tools.calls import Call, ToolFormat

_RESULT = "<tool_response>\n{}\n</tool_response>"
# Short: models without a template for tools may have little room.
_TOLD = "You can call these functions:\n{functions}\nTo call one, write:\n{example}"
_EXAMPLE = Call("name", '{"parameter": "value"}')
# How Mistral's templates check the ids of calls.
_NINE = ("length != 9", "length < 9")
_SHORT_ID = re.compile("[A-Za-z0-9]{9}")


def knows_tools(template: ChatTemplate) -> bool:
    """Whether a template shows tools."""
    return template.reads("tools")


def told(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], format: ToolFormat) -> list[Turn]:
    """The turns for a template that knows no tools: an early one has them described, calls are text of the assistant,
    and results are what the user says."""
    plain: list[Turn] = []
    for are_results, group in itertools.groupby(turns, lambda turn: turn.role == "tool"):
        if are_results:
            plain.append(Turn("user", "\n".join(_RESULT.format(turn.content) for turn in group)))
        else:
            plain += [_with_calls_as_text(turn, format) for turn in group]
    if not tools:
        return plain
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    description = _TOLD.format(functions=functions, example=format.write([_EXAMPLE]))
    # Some templates refuse a system's turn.
    place = next((i for i, turn in enumerate(plain) if turn.role in ("system", "user")), None)
    if place is None:
        return [Turn("user", description), *plain]
    first = plain[place]
    said = [first.content, description] if first.role == "system" else [description, first.content]
    plain[place] = first._replace(content="\n\n".join(text for text in said if text))
    return plain


def _with_calls_as_text(turn: Turn, format: ToolFormat) -> Turn:
    if "tool_calls" not in turn.more:
        return turn
    calls = format.write([_call(call) for call in turn.more["tool_calls"]])
    more = {key: value for key, value in turn.more.items() if key != "tool_calls"}
    return Turn(turn.role, f"{turn.content}\n{calls}" if turn.content else calls, more)


def with_short_ids(turns: Sequence[Turn], template: ChatTemplate) -> Sequence[Turn]:
    """The turns with ids of calls that Mistral's templates accept, which refuse all that are not nine characters."""
    if not any(map(template.reads, _NINE)):
        return turns
    return [turn._replace(more=_shortened(turn.more)) for turn in turns]


def _shortened(more: Mapping[str, Any]) -> Mapping[str, Any]:
    shortened = dict(more)
    if isinstance(more.get("tool_call_id"), str):
        shortened["tool_call_id"] = _short(more["tool_call_id"])
    if "tool_calls" in more:
        calls = more["tool_calls"]
        shortened["tool_calls"] = [{**one, "id": _short(str(one.get("id", i)))} for i, one in enumerate(calls)]
    return shortened


def _short(name: str) -> str:
    return name if _SHORT_ID.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:9]


def _call(call: Mapping[str, Any]) -> Call:
    given = call["function"]["arguments"]
    return Call(call["function"]["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
