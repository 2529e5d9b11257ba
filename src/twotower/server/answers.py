"""What an answer consists of: the model's reasoning, its content and the calls of functions in it."""

import functools
import re
from collections.abc import Collection
from typing import NamedTuple

from twotower.server.reasoning import Thought, ThoughtFormat, Thoughts
from twotower.server.tool_request import ToolUse
from twotower.server.tools.answer import Answer, Marks
from twotower.server.tools.calls import Call


class AnswerFormat(NamedTuple):
    """How to read the answers to a request.

    `tools` are those that an answer may call, written between the `marks`; `thoughts` is how reasoning is marked, and
    `begins_in_thought` whether an answer begins in it; without `shows_thoughts` it is left out. `control` are the
    tokenizer's control tokens.
    """

    control: frozenset[str]
    marks: Marks
    tools: ToolUse | None
    thoughts: ThoughtFormat | None
    begins_in_thought: bool
    shows_thoughts: bool = True

    @property
    def shows_control(self) -> bool:
        """Whether the text must have the control tokens, because marks of reasoning or calls are among them."""
        return not self._marks.isdisjoint(self.control)

    def reading(self) -> "Reading":
        """Begins to read an answer."""
        dropped = ControlTokens(self.control - self._marks) if self.shows_control else None
        thoughts = None if self.thoughts is None else Thoughts(self.thoughts, open=self.begins_in_thought)
        calls = None
        if self.tools is not None:
            calls = Answer(self.marks, self.tools.functions, one_call=self.tools.one_call)
        return Reading(dropped, thoughts, calls, shows_thoughts=self.shows_thoughts)

    @property
    def _marks(self) -> frozenset[str]:
        of_thoughts = frozenset(() if self.thoughts is None else (self.thoughts.open, self.thoughts.close))
        return of_thoughts | (frozenset() if self.tools is None else self.marks.format.marks)


class Reading:
    """Reads an answer of which pieces come, and gives its parts in their order; content is a plain text. What the
    pieces are makes no difference to what their parts join to."""

    def __init__(
        self, dropped: "ControlTokens | None", thoughts: Thoughts | None, calls: Answer | None, *, shows_thoughts: bool
    ) -> None:
        self._shows_thoughts = shows_thoughts
        self._dropped = dropped
        self._thoughts = thoughts
        self._calls = calls

    @property
    def num_calls(self) -> int:
        """How many calls have come."""
        return 0 if self._calls is None else self._calls.num_calls

    def push(self, text: str) -> list[Thought | str | Call]:
        """What a new piece of the text makes certain."""
        return self._read(text if self._dropped is None else self._dropped.push(text))

    def end(self) -> list[Thought | str | Call]:
        """What is left at the end of the text."""
        parts = self._read("" if self._dropped is None else self._dropped.push("", final=True))
        if self._thoughts is not None:
            parts += self._sorted(self._thoughts.end())
        return parts + (self._calls.end() if self._calls is not None else [])

    def _read(self, text: str) -> list[Thought | str | Call]:
        if self._thoughts is not None:
            return self._sorted(self._thoughts.push(text))
        return self._sorted([text] if text else [])

    def _sorted(self, parts: list[Thought | str]) -> list[Thought | str | Call]:
        """The parts with the calls found in content."""
        found: list[Thought | str | Call] = []
        for part in parts:
            if isinstance(part, Thought):
                found += [part] if self._shows_thoughts else []
            else:
                found += [part] if self._calls is None else self._calls.push(part)
        return found


class ControlTokens:
    """Leaves control tokens out of a text that comes in pieces."""

    def __init__(self, tokens: Collection[str]) -> None:
        self._pattern, self._beginnings, self._longest = _search(frozenset(tokens))
        self._held = ""  # what may become a control token

    def push(self, text: str, *, final: bool = False) -> str:
        """What a new piece of the text makes certain, all of it if it is the last."""
        held, at, shown = self._held + text, 0, ""
        while (match := self._pattern.search(held, at)) is not None:
            if not final and held[match.start() :] in self._beginnings:  # of a longer one
                break
            shown += held[at : match.start()]
            at = match.end()
        ends = () if final else range(max(len(held) - self._longest + 1, at), len(held))
        end = next((i for i in ends if held[i:] in self._beginnings), len(held))
        self._held = held[end:]
        return shown + held[at:end]


@functools.lru_cache(maxsize=8)  # a vocabulary may have a thousand control tokens
def _search(tokens: frozenset[str]) -> tuple[re.Pattern[str], frozenset[str], int]:
    """A pattern of the tokens, the longest first because one may begin like another; what they begin with; and the
    length of the longest."""
    pattern = "|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)"
    beginnings = frozenset(token[:length] for token in tokens for length in range(1, len(token)))
    return re.compile(pattern), beginnings, max(map(len, tokens), default=1)
