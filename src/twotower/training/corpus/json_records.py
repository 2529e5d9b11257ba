"""Records of JSON files, read one at a time whatever their size."""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from twotower.training.corpus.documents import LongText, SourceRecord, check_text
from twotower.training.corpus.files import CHUNK, LONGEST

_SPACE = " \t\n\r\ufeff"
_NOT_SPACE = re.compile(f"[^{_SPACE}]")
# What may end a value outside a string, and what begins a string
_STRUCTURE = re.compile(r'["{}\[\]]')
# A string, and as many whole characters and escapes within one as there are
_STRING = re.compile(r'"(?>[^"\\]+|\\.)*+"', re.DOTALL)
_PART_OF_STRING = re.compile(r'(?>[^"\\]+|\\u[0-9a-fA-F]{4}|\\[^u])*+', re.DOTALL)
_LONGEST_ESCAPE = 6
# The one key of the object that stands for a long text while its record is parsed
_LONG_TEXT = "<long text>"


def read_json(file: Path, opened: IO[str]) -> Iterator[SourceRecord]:
    """The objects of a text file with one a line, or with a list of them.

    Texts of a record of more than LONGEST characters are kept in temporary files and given as LongText. Raises
    ValueError, naming the line, for what is no such JSON.
    """
    feed = _Feed(opened)
    while feed.peek():
        if feed.peek() == "[":
            yield from _list(file, feed)
            return
        where = f"{file} line {feed.line}"
        line = feed.rest_of_line()
        if line is not None:
            yield SourceRecord(where, _object(line, where))
        else:
            yield SourceRecord(where, _scanned(feed, where))
            if feed.peek(within_line=True):
                raise ValueError(f"{where} has more than one value; write one a line")


def _list(file: Path, feed: "_Feed") -> Iterator[SourceRecord]:
    """The objects of a list, whose "[" is next."""
    begin = f"{file} line {feed.line}"
    feed.at += 1
    after = feed.peek()
    while after != "]":
        where = f"{file} line {feed.line}"
        yield SourceRecord(where, _scanned(feed, where))
        after = feed.peek()
        if not after:
            raise ValueError(f"{begin} begins a list that the file does not end; make or download it again")
        if after == ",":
            feed.at += 1
            feed.peek()
        elif after != "]":
            raise ValueError(f"{file} line {feed.line} is not JSON: {after!r} where ',' or ']' must be; correct it")
    feed.at += 1
    if feed.peek():
        raise ValueError(f"{file} line {feed.line} has more behind the end of the list; remove it")


class _Feed:
    """The text of an open file from the place `at` of `text` on. `text` holds no more than what was asked for."""

    def __init__(self, opened: IO[str]) -> None:
        self.text = ""
        self.at = 0
        self._opened = opened
        self._ends = 0  # of lines that have been read

    @property
    def line(self) -> int:
        """The number of the line of the next character."""
        return 1 + self._ends - self.text.count("\n", self.at)

    def fill(self) -> bool:
        """Reads the rest of a line, or CHUNK characters of it; False at the end of the file."""
        more = self._opened.readline(CHUNK)
        self.text = self.text[self.at :] + more
        self.at = 0
        self._ends += more.endswith("\n")
        return bool(more)

    def peek(self, within_line: bool = False) -> str:
        """Goes to the next character that is no space, and returns it; "" at the end of the file or line."""
        while not (found := _NOT_SPACE.search(self.text, self.at)):
            if within_line and self.text.endswith("\n"):
                return ""
            self.at = len(self.text)
            if not self.fill():
                return ""
        self.at = found.start()
        return found[0]

    def rest_of_line(self) -> str | None:
        """Takes the rest of the line, or returns None where that is longer than LONGEST."""
        while not self.text.endswith("\n") and len(self.text) - self.at <= LONGEST and self.fill():
            pass
        if len(self.text) - self.at > LONGEST:
            return None
        line = self.text[self.at :]
        self.text, self.at = "", 0
        return line


def _object(text: str, where: str, long_texts: Sequence[LongText] = ()) -> dict[str, Any]:
    """The JSON object of a text in which long texts may be objects that give their places in `long_texts`."""

    def hook(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"it has the field {twice!r} more than once")
        place = found.get(_LONG_TEXT) if len(found) == 1 else None
        return long_texts[place] if type(place) is int and place in range(len(long_texts)) else found

    try:
        value = json.loads(text, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON: {error.msg.removesuffix(' at')} at its character {error.pos + 1}; correct it"
        ) from error
    except (ValueError, RecursionError) as error:  # fields given twice, numbers of too many digits, nesting too deep
        raise ValueError(f"{where} can't be read: {error}; correct it") from error
    if not isinstance(value, dict):
        raise ValueError(f'{where} holds a {type(value).__name__}, must hold objects such as {{"text": "…"}}')
    return value


def _scanned(feed: _Feed, where: str) -> dict[str, Any]:
    """Takes the JSON object that is next, found by its brackets; its long texts are left in temporary files."""
    if feed.peek() != "{":
        here = f"has {feed.text[feed.at :][:20]!r}" if feed.peek() else "the file ends"
        raise ValueError(f'{where} must hold an object such as {{"text": "…"}}, but {here} there; correct it')
    parts: list[str] = []
    long_texts: list[LongText] = []
    depth = length = 0
    while True:
        found = _STRUCTURE.search(feed.text, feed.at)
        end = found.start() if found else len(feed.text)
        parts.append(feed.text[feed.at : end])
        feed.at = end
        if found and found[0] == '"':
            parts.append(_string(feed, where, long_texts))
        elif found:
            parts.append(found[0])
            feed.at += 1
            depth += 1 if found[0] in "{[" else -1
            if depth == 0:
                return _object("".join(parts), where, long_texts)
        elif not feed.fill():
            raise ValueError(f"{where} begins an object that the file does not end; make or download it again")
        length += sum(map(len, parts[-2:]))
        if length > 4 * LONGEST:
            raise ValueError(f"{where} holds more than {4 * LONGEST} characters beside its long texts; split it")


def _string(feed: _Feed, where: str, long_texts: list[LongText]) -> str:
    """Takes the string that is next; a long one goes to a file, and what is returned stands for it."""
    while not (found := _STRING.match(feed.text, feed.at)):
        if "\n" in feed.text[feed.at :]:
            raise ValueError(f"{where} is not JSON: a line ends within a text; correct it")
        if len(feed.text) - feed.at > LONGEST:
            long_texts.append(_spooled(feed, where))
            return f'{{"{_LONG_TEXT}": {len(long_texts) - 1}}}'
        if not feed.fill():
            raise ValueError(f"{where} begins a text that the file does not end; make or download it again")
    feed.at = found.end()
    return found[0]


def _spooled(feed: _Feed, where: str) -> LongText:
    """Takes a string and leaves its text in a temporary file."""
    spool = tempfile.TemporaryFile("w+", encoding="utf-8", newline="")  # noqa: SIM115, the text keeps it
    feed.at += 1
    half = ""  # of a character, whose other half may follow
    while True:
        found = _PART_OF_STRING.match(feed.text, feed.at)
        assert found is not None
        feed.at = found.end()
        try:
            text = half + json.loads(f'"{found[0]}"')
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg} within a text; correct it") from error
        ended = feed.text.startswith('"', feed.at)
        half = text[-1] if not ended and "\ud800" <= text[-1:] <= "\udbff" else ""
        whole = text.removesuffix(half).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        spool.write(check_text(whole, where))
        if ended:
            feed.at += 1
            return LongText(lambda: _reread(spool))
        if len(feed.text) - feed.at >= _LONGEST_ESCAPE or not feed.fill():
            raise ValueError(f"{where} is not JSON: a text has a bad escape or no end; correct it")


def _reread(spool: IO[str]) -> Iterator[str]:
    spool.seek(0)
    while text := spool.read(CHUNK):
        yield text
