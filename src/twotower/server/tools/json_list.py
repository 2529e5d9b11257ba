"""`[{"name": …, "arguments": {…}}, …]`: xLAM and, between marks, Nemotron Nano 2, Granite 3, Phi 4 and Command R7B."""

from collections.abc import Sequence

from twotower.server.tools.bare import may_be_call
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

# Marks before a list -> marks behind it.
PAIRS = {
    "<TOOLCALL>": "</TOOLCALL>",
    "<|tool_call|>": "<|/tool_call|>",
    "<tool_calls>": "</tool_calls>",
    "<|START_ACTION|>": "<|END_ACTION|>",
}
_PREFIX = "functools["
_FENCE, _FENCE_END = "```json", "```"  # Markdown's


class JsonList:
    """A list of JSON objects, or one object; a `ToolFormat`. `mark` is what calls that are forced begin with, if any.

    Without a mark it begins a line and must have calls of given functions alone, for it may be any JSON.
    """

    starts, line_starts = tuple(PAIRS), ("[", "{", _PREFIX, _FENCE)
    marks = frozenset((*PAIRS, *PAIRS.values()))

    def __init__(self, mark: str = "") -> None:
        self._mark = mark

    def read(self, text: str, functions: Functions, brackets: Brackets, *, final: bool) -> Found | None:
        mark = next((mark for mark in (*PAIRS, _FENCE) if text.startswith(mark)), "")
        closing = PAIRS.get(mark, _FENCE_END)
        start = len(_PREFIX) - 1 if text.startswith(_PREFIX) else skip_blanks(text, len(mark))
        no_call = Found((), len(mark) or 1)
        if start == len(text):
            return None
        if text[start] not in "[{" or not (mark in PAIRS or may_be_call(text[start:])):
            return no_call
        end = brackets.end(text, start)
        if end is None:
            return None
        calls = calls_in(load(text[start:end]), None if mark in PAIRS else functions)
        if not calls:
            return no_call
        last = behind(text, end, closing, final=final) if mark else end
        return None if last is None else Found(calls, last)

    def grammar(self, functions: Functions, mark: Mark, *, many: bool) -> str:
        calls = f"{literal('[')} {repeated('call', ', ', many=many)} {literal(']')}"
        if self._mark:
            calls = f"{mark(self._mark)} {calls} {mark(PAIRS[self._mark])}"
        return f"calls: {calls}\n{json_call(functions, 'arguments')}"

    def write(self, calls: Sequence[Call]) -> str:
        return f"{self._mark}[{', '.join(map(written, calls))}]{PAIRS.get(self._mark, '')}"
