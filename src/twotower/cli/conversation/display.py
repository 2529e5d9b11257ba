"""Draws an answer while it comes: live in a terminal, as plain text elsewhere."""

import time
from collections.abc import Generator, Iterator
from contextlib import closing

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from twotower.cli.conversation.answering import AnswerEnd, Moment
from twotower.cli.live import FixedPlace, draw_block, speeds, tail

_CONTROLS = {code: "·" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class AnswerView:
    """What has come of an answer: its text, and the block in progress behind it."""

    def __init__(self) -> None:
        self.text = ""
        self.places: tuple[FixedPlace | None, ...] = ()
        self.before: tuple[FixedPlace | None, ...] = ()
        self.end: AnswerEnd | None = None
        self.seconds = 0.0

    def take(self, moment: Moment, seconds: float) -> None:
        """Adds a piece that took so many seconds to come."""
        self.text += moment.text
        self.before, self.places = self.places, moment.places
        self.end = moment.end
        self.seconds += seconds

    def drawn(self, console: Console) -> Text:
        return Text(_visible(self.text)).append_text(draw_block(self.places, self.before, console))

    def status(self) -> str:
        """Where the answer is, in a few words."""
        if not self.places:
            return f"{self.seconds:.1f} s"
        return f"{self.seconds:.1f} s, {self.places.count(None)} of {len(self.places)} places masked"

    def speed(self) -> str:
        """What the finished answer cost, in words; "" where nobody says."""
        end = self.end
        if end is None or not end.num_tokens:
            return ""
        if end.denoiser_calls is None or end.context_calls is None:
            words = f"{end.num_tokens} tokens, {end.num_tokens / self.seconds:.0f} tokens/s"
        else:
            words = speeds(end.num_tokens, self.seconds, end.denoiser_calls, end.context_calls)
        if end.num_context is None:
            return words
        most = "" if end.max_context is None else f" of {end.max_context}"
        return f"{words}; {end.num_context}{most} tokens of context"


def draw_answer(moments: Generator[Moment, None, None], view: AnswerView, console: Console) -> None:
    """Draws an answer as it comes, and leaves its whole text behind, also where it breaks off. Raises what `moments`
    does."""
    is_live = console.is_terminal and not console.is_dumb_terminal
    try:
        if not is_live:
            with closing(moments):
                for moment in _timed(moments, view):
                    print(moment.text, end="", flush=True, file=console.file)
            return
        with closing(moments), Live(console=console, auto_refresh=False, transient=True) as live:
            for _ in _timed(moments, view):
                shown = tail(view.drawn(console), console, console.width, console.height - 2)
                live.update(Group(shown, Text(view.status(), "dim")), refresh=True)
    finally:
        if not is_live:
            print(file=console.file, flush=True)
        elif view.text:
            console.print(Text(_visible(view.text)))


def _visible(text: str) -> str:
    """A text whose control characters can't move the cursor or do worse."""
    return text.translate(_CONTROLS)


def _timed(moments: Iterator[Moment], view: AnswerView) -> Iterator[Moment]:
    """Takes the moments into the view; time that is spent drawing does not count."""
    while True:
        began = time.perf_counter()
        moment = next(moments, None)
        if moment is None:
            return
        view.take(moment, time.perf_counter() - began)
        yield moment
