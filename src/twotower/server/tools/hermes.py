"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5 and 3, and many tuned like them."""

from twotower.server.tools.calls import Brackets, Found, Functions, behind, calls_in, load, skip_blanks

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    """A JSON object for each call, between two marks; a `ToolFormat`."""

    starts, line_starts = (_OPEN,), ()
    marks = frozenset((_OPEN, _CLOSE))

    def read(self, text: str, functions: Functions, brackets: Brackets, *, final: bool) -> Found | None:
        start = skip_blanks(text, len(_OPEN))
        if start == len(text):
            return None
        if text[start] != "{":
            return Found((), len(_OPEN))
        end = brackets.end(text, start)
        if end is None:
            return None
        calls = calls_in(load(text[start:end]))
        if not calls:
            return Found((), len(_OPEN))
        # the model may end its text instead of closing the call
        last = behind(text, end, _CLOSE, final=final)
        return None if last is None else Found(calls, last)
