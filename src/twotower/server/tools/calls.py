"""What calls of functions are, and what a way of writing them into a text must say of itself."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

# What opens or closes something in JSON, and an escaped character, which may look like one.
_MARKS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_BLANKS = re.compile(r"\s*")
# Under which keys models write the name of a call and its arguments.
_NAMES = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters")

# Lark for a mark of a format: the control token of that name, or the text.
Mark = Callable[[str], str]
# The JSON schemas of the arguments of each function, by its name.
Functions = Mapping[str, Mapping[str, Any]]


class Call(NamedTuple):
    """A call of a function, with its arguments as a text of JSON: an object."""

    name: str
    arguments: str


class Found(NamedTuple):
    """What stands at the beginning of a text, up to the character `end`: calls, or if there are none, content."""

    calls: tuple[Call, ...]
    end: int


class ToolFormat(Protocol):
    """How a model writes calls into its text.

    A call begins with one of `starts`; one of `line_starts` begins one only at the start of a line, because it is
    frequent in other text. `marks` are all texts around calls that may be control tokens of a tokenizer.
    """

    @property
    def marks(self) -> frozenset[str]: ...

    @property
    def starts(self) -> tuple[str, ...]: ...

    @property
    def line_starts(self) -> tuple[str, ...]: ...

    def read(self, text: str, functions: Functions, brackets: "Brackets", *, final: bool) -> Found | None:
        """What a text that begins with one of the starts has there; None while the text that comes next decides it.

        `final` says that none comes. `brackets` is the same one at every call with the same beginning.
        """
        ...

    def grammar(self, functions: Functions, mark: Mark, *, many: bool) -> str:
        """Rules of llguidance's Lark, of which `calls` is for one call or, with `many`, for at least one."""
        ...

    def write(self, calls: Sequence[Call]) -> str:
        """The calls as a model writes them."""
        ...


class Brackets:
    """Finds where a JSON object or list in a growing text ends, reading each character once."""

    def __init__(self) -> None:
        self._at: int | None = None
        self._depth = 0
        self._in_string = False
        self._end: int | None = None

    @property
    def num_read(self) -> int:
        """How many characters of the text have been read."""
        return self._at or 0

    def end(self, text: str, start: int) -> int | None:
        """The place behind the bracket that closes the one at `start`, None if there is none yet."""
        if self._end is not None:
            return self._end
        for mark in _MARKS.finditer(text, start if self._at is None else self._at):
            self._at = mark.end()
            if mark[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string and mark[0] in "{}[]":
                self._depth += 1 if mark[0] in "{[" else -1
                if self._depth == 0:
                    self._end = self._at
                    return self._end
        # a backslash at the end escapes what comes next
        rest = text[start if self._at is None else self._at :]
        self._at = len(text) - rest.endswith("\\")
        return None


def load(text: str) -> Any:
    """The value of a text of JSON, None if it is none. Line breaks in strings, which models write, are allowed."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def dump(value: Any) -> str | None:
    """A value as JSON, None if it has a number that JSON can't say."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return None
    # half of a surrogate pair, which only its escape can say
    return text if text.isascii() or not re.search("[\ud800-\udfff]", text) else json.dumps(value)


def calls_in(value: Any, known: Collection[str] | None = None) -> tuple[Call, ...]:
    """The calls that a JSON value has, an object or a list of objects with a name and arguments; none if any of them is
    no call. With `known` names it must have one of these and arguments, if they are none too."""
    found = [_call(one, known) for one in (value if isinstance(value, list) else [value])]
    calls = tuple(call for call in found if call is not None)
    return calls if len(calls) == len(found) else ()


def written(call: Call, key: str = "arguments") -> str:
    """A call as a JSON object that has its arguments under a key."""
    return f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "{key}": {call.arguments}}}'


def skip_blanks(text: str, at: int) -> int:
    """The place of the first character from `at` on that is no blank, the text's length if there is none."""
    blanks = _BLANKS.match(text, at)
    assert blanks is not None
    return blanks.end()


def behind(text: str, at: int, closing: str, *, final: bool) -> int | None:
    """The place behind a closing mark, which blanks may precede and the end of the text may cut; `at` where something
    else stands there, and None while the text that comes next decides it."""
    place = skip_blanks(text, at)
    if text.startswith(closing, place):
        return place + len(closing)
    if not closing.startswith(text[place:]):
        return at
    return len(text) if final else None


def _call(value: Any, known: Collection[str] | None) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]  # OpenAI's form
    name = next((value[key] for key in _NAMES if key in value), None) if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        return None
    if known is not None and (name not in known or not any(key in value for key in _ARGUMENTS)):
        return None
    arguments: Any = next((value[key] for key in _ARGUMENTS if value.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = load(arguments)
    text = dump(arguments) if isinstance(arguments, dict) else None
    return None if text is None else Call(name, text)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
