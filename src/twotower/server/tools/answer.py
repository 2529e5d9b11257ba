"""Splits an answer, as it comes, into its content and the calls of functions in it."""

import re

from twotower.server.tools.calls import Brackets, Call, Functions, ToolFormat

# Most characters that are read in vain, of texts that begin like calls and are none. One inside the other, they would
# take the square of their length; behind them all is content.
_MOST_IN_VAIN = 2_000_000


class Marks:
    """What the text of an answer must be searched for: what calls in a format begin with."""

    def __init__(self, format: ToolFormat) -> None:
        self.format = format
        marks = {*format.starts, *format.line_starts}
        # the longest first: one may begin like another
        self.pattern = re.compile("|".join(map(re.escape, sorted(marks, key=lambda m: (-len(m), m)))))
        self.beginnings = frozenset(mark[:length] for mark in marks for length in range(1, len(mark)))
        self.longest = max(map(len, marks))


class Answer:
    """Reads an answer of which pieces come, and gives its content and its calls in their order.

    Blanks beside a call are no content. With `one_call` what follows the first call is dropped if it is another.
    What the pieces are makes no difference to what their parts join to.
    """

    def __init__(self, marks: Marks, functions: Functions, *, one_call: bool = False) -> None:
        self._marks = marks
        self._functions = functions
        self._one_call = one_call
        self._held = ""  # text that may become part of a call
        self._blanks = ""  # blanks that are content only if other text follows them
        self._brackets: Brackets | None = None  # of the call that `_held` begins with
        self._line_begins = True
        self._in_vain = 0  # characters that were read as calls and are none
        self.num_calls = 0

    def push(self, text: str) -> list[str | Call]:
        """What a new piece of the text makes certain."""
        self._held += text
        return self._read(final=False)

    def end(self) -> list[str | Call]:
        """What is left at the end of the text."""
        given = self._read(final=True)
        return [*given, self._blanks] if self._blanks and not self.num_calls else given

    def _read(self, *, final: bool) -> list[str | Call]:
        given: list[str | Call] = []
        while self._held:
            if self._brackets is None:
                searched = self._in_vain < _MOST_IN_VAIN
                start, length = self._next_mark(final=final) if searched else (len(self._held), 0)
                given += self._content(start)
                if not length:
                    break
                self._brackets = Brackets()
            found = self._marks.format.read(self._held, self._functions, self._brackets, final=final)
            if found is None and not final:
                break
            num_read, self._brackets = self._brackets.num_read, None
            if found is None or not found.calls:
                self._in_vain += len(self._held) if found is None else num_read
                given += self._content(1 if found is None else found.end)
            else:
                calls = found.calls[: max(1 - self.num_calls, 0)] if self._one_call else found.calls
                self.num_calls += len(calls)
                given += calls
                self._held = self._held[found.end :]
                self._line_begins = True
        return given

    def _next_mark(self, *, final: bool) -> tuple[int, int]:
        """The place of the next mark in the held text and its length. Without one, the length is 0, and the place is
        where text begins that may become one."""
        held, marks = self._held, self._marks
        at = 0
        while (match := marks.pattern.search(held, at)) is not None:
            if not final and held[match.start() :] in marks.beginnings:  # of a longer one
                return match.start(), 0
            if match[0] not in marks.format.line_starts or self._at_line_start(match.start()):
                return match.start(), len(match[0])
            at = match.start() + 1
        if final:
            return len(held), 0
        first = max(len(held) - marks.longest + 1, at)
        return next((i for i in range(first, len(held)) if held[i:] in marks.beginnings), len(held)), 0

    def _at_line_start(self, place: int) -> bool:
        before = self._held[:place].rstrip(" \t")
        return before.endswith("\n") if before else self._line_begins

    def _content(self, length: int) -> list[str | Call]:
        """Takes so many characters from the held text as content; blanks wait for what follows them."""
        text, self._held = self._held[:length], self._held[length:]
        if not text:
            return []
        line = text.rstrip(" \t")
        self._line_begins = line.endswith("\n") if line else self._line_begins
        whole = self._blanks + text
        shown = whole.rstrip()
        self._blanks = whole[len(shown) :]
        return [shown] if shown else []
