"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5 and 3, and many tuned like them."""

from collections.abc import Sequence

from twotower.server.tools.calls import (
    Brackets,
    Call,
    Found,
    Functions,
    Mark,
    behind,
    calls_in,
    load,
    skip_blanks,
    written,
)
from twotower.server.tools.grammar import json_call, literal, repeated

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_LINE = "\n"


class Hermes:
    """A JSON object for each call, between two marks; a `ToolFormat`."""

    starts, line_starts = (OPEN,), ()
    marks = frozenset((OPEN, CLOSE))

    def read(self, text: str, functions: Functions, brackets: Brackets, *, final: bool) -> Found | None:
        start = skip_blanks(text, len(OPEN))
        if start == len(text):
            return None
        end = brackets.end(text, start) if text[start] in "{[" else start
        if end is None:
            return None
        calls = calls_in(load(text[start:end]))
        if not calls:
            return Found((), len(OPEN))
        # the model may end its text instead of closing the call
        last = behind(text, end, CLOSE, final=final)
        return None if last is None else Found(calls, last)

    def grammar(self, functions: Functions, mark: Mark, *, many: bool) -> str:
        line = literal(_LINE)
        rules = (
            f"calls: {repeated('marked', _LINE, many=many)}\nmarked: {mark(OPEN)} {line} call {line} {mark(CLOSE)}\n"
        )
        return rules + json_call(functions, "arguments")

    def write(self, calls: Sequence[Call]) -> str:
        return "\n".join(f"{OPEN}\n{written(call)}\n{CLOSE}" for call in calls)
