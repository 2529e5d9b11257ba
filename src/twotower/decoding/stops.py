"""Finds stop strings in a text as it grows."""

from collections.abc import Sequence
from typing import NamedTuple

import tokenizers


class FoundStop(NamedTuple):
    """A stop string in a text, and where it ends the text, in characters without control tokens."""

    end: int
    stop: str


class StopFinder:
    """The text of a request so far, and where the earliest of its stop strings begins in it.

    Control tokens are not part of the text, but a stop string may name them, alone or among other characters, and is
    found where the model wrote these tokens. Inside, a lone surrogate, which no decoded text holds, stands for each.
    With `shows_control` they are part of the text. A stop string that is complete within the first `min_tokens` tokens
    is passed over. `include` keeps the stop string in the text.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | None,
        stops: Sequence[str],
        *,
        shows_control: bool = False,
        min_tokens: int = 0,
        include: bool = False,
    ) -> None:
        reads = tokenizer is not None and stops and not shows_control
        added = tokenizer.get_added_tokens_decoder() if tokenizer is not None and reads else {}
        named = [(token.content, i) for i, token in added.items() if token.special and _holds(stops, token.content)]
        # Longest first: a name may be part of another
        named.sort(key=lambda entry: -len(entry[0]))
        self._marks = {i: chr(0xD800 + place) for place, (_, i) in enumerate(named)}
        with_marks = list(stops)
        for name, i in named:
            with_marks = [stop.replace(name, self._marks[i]) for stop in with_marks]
        # as it is found -> as it was given
        self._stops = dict(zip((*stops, *with_marks), (*stops, *stops), strict=True))
        self._include = include
        self._min_tokens = min_tokens
        self._num_tokens = self._passed = 0  # characters in which no stop string ends
        self._text = ""

    def push(self, token_id: int, piece: str) -> None:
        """Appends what a token added to the text; the id is -1 for text that earlier tokens held back."""
        self._text += piece + self._marks.get(token_id, "")
        self._num_tokens += token_id >= 0
        if self._num_tokens <= self._min_tokens:
            self._passed = len(self._text)

    def find(self) -> FoundStop | None:
        """The earliest stop string, the shortest of those that begin there."""
        starts = [(self._text.find(s, max(self._passed - len(s) + 1, 0)), len(s), s) for s in self._stops]
        first = min((found for found in starts if found[0] >= 0), default=None)
        if first is None:
            self._passed = len(self._text)
            return None
        start, length, stop = first
        return FoundStop(self._visible(self._text[: start + self._include * length]), self._stops[stop])

    @property
    def num_pending(self) -> int:
        """The number of characters at the end of the text that may be the beginning of a stop string."""
        begin = min((self._beginning(stop) for stop in self._stops), default=len(self._text))
        return self._visible(self._text[begin:])

    def _beginning(self, stop: str) -> int:
        """Where the end of the text may begin the stop string; the text's length where it can't."""
        place = self._text.find(stop[0], max(len(self._text) - len(stop) + 1, 0))
        while place >= 0 and not stop.startswith(self._text[place:]):
            place = self._text.find(stop[0], place + 1)
        return place if place >= 0 else len(self._text)

    def _visible(self, text: str) -> int:
        return len(text) - sum(text.count(mark) for mark in self._marks.values())


def _holds(stops: Sequence[str], name: str) -> bool:
    return any(name in stop for stop in stops)
