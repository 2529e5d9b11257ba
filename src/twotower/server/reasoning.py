"""Splits an answer, as it comes, into the model's reasoning and what it answers."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from twotower.checkpoints.chat_template import ChatTemplate

# "auto" goes by the template; the others are called as in vLLM.
ReasoningParser = Literal["auto", "none", "deepseek_r1", "qwen3", "mistral", "seed_oss"]

# Whether an answer begins in reasoning, may begin with the mark that opens it, or comes behind it.
AtStart = Literal["open", "possible", "over"]


class Thought(NamedTuple):
    """A part of the model's reasoning."""

    text: str


class ThoughtFormat(NamedTuple):
    """The marks around reasoning. With `implied` an answer begins with it, also where nothing says so."""

    open: str
    close: str
    implied: bool = False


_FORMATS = {
    "mistral": ThoughtFormat("[THINK]", "[/THINK]"),
    "seed_oss": ThoughtFormat("<seed:think>", "</seed:think>"),
    "qwen3": ThoughtFormat("<think>", "</think>"),
    "deepseek_r1": ThoughtFormat("<think>", "</think>", implied=True),
}


def thought_format(parser: ReasoningParser, template: "ChatTemplate | None") -> ThoughtFormat | None:
    """The format of a name; for "auto" the one whose marks the chat template writes, and None if it has none."""
    if parser == "none":
        return None
    if parser != "auto":
        return _FORMATS[parser]
    known = (
        f for f in _FORMATS.values() if template is not None and (template.reads(f.open) or template.reads(f.close))
    )
    return next(known, None)


def thought_at_start(format: ThoughtFormat, prompt: str, continued: str | None, *, thinks: bool) -> AtStart:
    """Whether an answer to a prompt is reasoning from its first token on, may begin it with a mark, or is behind it.

    Templates open it at the end of the prompt, or close it there where no reasoning is wanted. `continued` is the
    message that the answer goes on with, and `thinks` is False where the request switches reasoning off.
    """
    if continued is not None:
        return "open" if continued.rfind(format.open) > continued.rfind(format.close) else "over"
    end = prompt.rstrip()
    if end.endswith(format.open):
        return "open"
    if end.endswith(format.close) or not thinks:
        return "over"
    return "open" if format.implied else "possible"


def thought_rules(format: ThoughtFormat, start: AtStart, tokens: Mapping[str, int]) -> str:
    """Rules in llguidance's Lark of answers that have reasoning where they begin with it, and go on with `@held`.

    A mark that is among the `tokens` with ids of their own is that token, because it is not found by its text.
    """
    opening, closing = (f"<[{tokens[mark]}]>" if mark in tokens else json.dumps(mark) for mark in format[:2])
    thought = f"thought: /(?s:.*)/ {closing}" if format.close in tokens else f"thought[suffix={closing}]: /(?s:.*)/"
    begins = {"open": r"thought /\n{0,2}/", "possible": rf"({opening} thought /\n{{0,2}}/)?", "over": ""}[start]
    return f"start: {begins} @held\n{thought}\n"


class Thoughts:
    """Reads an answer of which pieces come, and gives the reasoning that it begins with and then what follows.

    Blanks at the edges of reasoning and behind it are no part of either. Reasoning that is never closed goes on to the
    end. `open` says whether the answer begins in it; otherwise it must begin with the opening mark. What the pieces are
    makes no difference to what their parts join to.
    """

    def __init__(self, format: ThoughtFormat, *, open: bool) -> None:
        self._format = format
        self._unmarked: Literal["thought", "answer"] = "thought" if open else "answer"
        self._now: Literal["start", "thought", "answer"] = "start"
        self._trims = open  # whether blanks that come next are at an edge
        self._held = ""

    def push(self, text: str) -> list[Thought | str]:
        """What a new piece of the text makes certain."""
        self._held += text
        return self._read(final=False)

    def end(self) -> list[Thought | str]:
        """What is left at the end of the text."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[Thought | str]:
        if self._now == "start" and not self._begin(final=final):
            return []
        if self._trims:
            self._held = self._held.lstrip()
            self._trims = not self._held
        if self._now == "answer":
            text, self._held = self._held, ""
            return [text] if text else []
        thought, mark, rest = self._held.partition(self._format.close)
        if not mark and not final:  # its end may be a part of the mark, and blanks before that
            thought = thought[: len(thought) - _overlap(thought, self._format.close)]
        shown = thought.rstrip()
        given: list[Thought | str] = [Thought(shown)] if shown else []
        if not mark:
            self._held = self._held[len(shown) :]
            return given
        self._now, self._trims, self._held = "answer", True, rest
        return given + self._read(final=final)

    def _begin(self, *, final: bool) -> bool:
        """Reads the mark at the beginning, if there is one. Returns whether it is known."""
        text = self._held.lstrip()
        marks = (self._format.open, self._format.close)
        mark = next((mark for mark in marks if text.startswith(mark)), None)
        if mark is None:
            undecided = not final and any(mark.startswith(text) for mark in marks)
            self._now = "start" if undecided else self._unmarked
            return not undecided
        self._now, self._trims, self._held = "thought" if mark == marks[0] else "answer", True, text[len(mark) :]
        return True


def _overlap(text: str, mark: str) -> int:
    """How many of a text's last characters a mark may begin with."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
