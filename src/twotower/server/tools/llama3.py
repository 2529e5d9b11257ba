"""`{"name": …, "parameters": {…}}`, maybe behind `<|python_tag|>`: Llama 3.1 to 3.3."""

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
from twotower.server.tools.grammar import json_call, repeated

_TAG = "<|python_tag|>"


class Llama3:
    """A JSON object for each call, with `;` between them; a `ToolFormat`.

    Without the tag it begins a line and must be a call of a given function, for it may be any JSON.
    """

    starts, line_starts = (_TAG,), ("{",)
    marks = frozenset((_TAG,))

    def read(self, text: str, functions: Functions, brackets: Brackets, *, final: bool) -> Found | None:
        tagged = text.startswith(_TAG)
        start = skip_blanks(text, len(_TAG)) if tagged else 0
        no_call = Found((), len(_TAG) if tagged else 1)
        if start == len(text):
            return None
        if text[start] != "{" or not (tagged or may_be_call(text)):
            return no_call
        end = brackets.end(text, start)
        if end is None:
            return None
        calls = calls_in(load(text[start:end]), None if tagged else functions)
        if not calls:
            return no_call
        last = behind(text, end, ";", final=final)
        return None if last is None else Found(calls, last)

    def grammar(self, functions: Functions, mark: Mark, *, many: bool) -> str:
        return f"calls: {repeated('call', '; ', many=many)}\n{json_call(functions, 'parameters')}"

    def write(self, calls: Sequence[Call]) -> str:
        return "; ".join(written(call, "parameters") for call in calls)
