"""`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` and, since 2025, `[TOOL_CALLS]name[ARGS]{…}`: Mistral's models."""

import re
from collections.abc import Sequence

from twotower.server.tools.calls import (
    Brackets,
    Call,
    Found,
    Functions,
    Mark,
    calls_in,
    dump,
    load,
    skip_blanks,
    written,
)
from twotower.server.tools.grammar import arguments_schema, distinct, json_call, literal, repeated, schema_rule

_OPEN, _ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
# What stands between the first mark and the arguments.
_HEAD = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\]\s*)?")
_IN_HEAD = re.compile(r"[\w.:/\s\[\]-]{0,300}")


class Mistral:
    """A list of JSON objects, or a name and a JSON object for each call; a `ToolFormat`. With `named`, calls that are
    forced have the latter form."""

    starts, line_starts = (_OPEN,), ()
    marks = frozenset((_OPEN, _ID, ARGS))

    def __init__(self, *, named: bool) -> None:
        self._named = named

    def read(self, text: str, functions: Functions, brackets: Brackets, *, final: bool) -> Found | None:
        start = skip_blanks(text, len(_OPEN))
        if start == len(text):
            return None
        no_call = Found((), len(_OPEN))
        name = ""
        if text[start] not in "[{":
            brace = text.find("{", start)
            head = text[start : brace if brace >= 0 else len(text)]
            if not _IN_HEAD.fullmatch(head):
                return no_call
            if brace < 0:
                return None
            matched = _HEAD.fullmatch(head)
            if matched is None:
                return no_call
            name, start = matched[1], brace
        end = brackets.end(text, start)
        if end is None:
            return None
        value = load(text[start:end])
        if name:
            arguments = dump(value) if isinstance(value, dict) else None
            return no_call if arguments is None else Found((Call(name, arguments),), end)
        calls = calls_in(value)
        return Found(calls, end) if calls else no_call

    def grammar(self, functions: Functions, mark: Mark, *, many: bool) -> str:
        if not self._named:
            calls = f"{literal(' ')}? {literal('[')} {repeated('call', ', ', many=many)} {literal(']')}"
            return f"calls: {mark(_OPEN)} {calls}\n{json_call(functions, 'arguments')}"
        arguments, rules = distinct("arguments", functions, lambda rule, own: schema_rule(rule, arguments_schema(own)))
        calls = " | ".join(f"{literal(name)} {mark(ARGS)} {rule}" for name, rule in arguments.items())
        return f"calls: call{'+' if many else ''}\ncall: {mark(_OPEN)} ({calls})\n{rules}"

    def write(self, calls: Sequence[Call]) -> str:
        if self._named:
            return "".join(f"{_OPEN}{call.name}{ARGS}{call.arguments}" for call in calls)
        return f"{_OPEN}[{', '.join(map(written, calls))}]"
