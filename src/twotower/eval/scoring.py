"""What an answer is worth, from 0 to 1. A degenerate answer is worth nothing, whatever it begins with."""

import ast
import json
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from twotower.eval.sandbox import passes

if TYPE_CHECKING:
    from twotower.eval.tasks import Example  # which checks its answers here

# A loop is text that says one thing at least so many times in a row, over at least so many characters.
_LOOP_TIMES, _LOOP_CHARACTERS = 4, 40
# Longer texts whose runs of so many words are mostly ones seen before go around in circles.
_RUN_WORDS, _FEWEST_RUNS, _DISTINCT_SHARE = 4, 40, 0.5

# Commas belong to a number where they part thousands: "1,200" is one number, "3,4" are two.
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def is_degenerate(text: str) -> bool:
    """Whether a text falls into a loop anywhere, or repeats most of its runs of four words."""
    words = text.split()
    runs = [tuple(words[i : i + _RUN_WORDS]) for i in range(len(words) - _RUN_WORDS + 1)]
    if len(runs) >= _FEWEST_RUNS and len(set(runs)) < _DISTINCT_SHARE * len(runs):
        return True
    letters = np.array([ord(letter) for word in words for letter in f"{word} "], dtype=np.int64)
    return any(_loops(letters, period) for period in range(1, len(letters) // _LOOP_TIMES + 1))


def _loops(letters: np.ndarray, period: int) -> bool:
    """Whether letters[i] = letters[i - period] holds over a stretch long enough."""
    changes = np.flatnonzero(letters[period:] != letters[:-period])
    edges = np.concatenate(([-1], changes, [len(letters) - period]))
    longest = int(np.diff(edges).max()) - 1 + period
    return longest >= max(_LOOP_TIMES * period, _LOOP_CHARACTERS)


def check_answer(example: "Example") -> None:
    """Raises ValueError for an answer that no reply can match, so that every reply would score 0."""
    answer, scorer = example.answer, example.scorer
    if scorer == "likelihood":
        return
    if not answer.strip() and scorer != "program":  # without tests a program has only to run
        raise ValueError(f"answer is {answer!r}, but scorer {scorer!r} compares replies with it; write one")
    if scorer == "number" and not _NUMBER.fullmatch(answer.strip()):
        raise ValueError(f"answer is {answer!r}, must be one number such as -1,200.5 for scorer 'number'")
    if scorer == "json":
        try:
            _json_value(answer)
        except ValueError as error:
            raise ValueError(f"answer is {answer!r}, must be JSON for scorer 'json': {error}") from error
    if scorer == "program":
        try:
            ast.parse(answer)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"answer is {answer!r}, must be Python for scorer 'program': {error}") from error
    needed = ""  # in every spelling
    if scorer == "exact":
        needed = answer.strip()
    elif scorer == "number" and _decimal(answer) != _decimal(answer).to_integral_value():
        needed = "."
    cut = [stop for stop in example.stop if stop in needed]
    if cut:
        raise ValueError(f"answer is {answer!r}, but replies end before stop {cut[0]!r}; drop it from one of the two")
    if scorer == "exact" and is_degenerate(answer):
        raise ValueError(f"answer is {answer!r}, a loop, for which a reply scores nothing; ask for something else")


def score_text(example: "Example", text: str) -> float:
    """1.0 for a right answer, else 0.0, by any scorer but `likelihood`, which needs the model; never raises for what a
    reply says."""
    return float(not is_degenerate(text) and _SCORERS[example.scorer](example, text))


def _exact(example: "Example", text: str) -> bool:
    return text.strip() == example.answer.strip()


def _number(example: "Example", text: str) -> bool:
    """The first number of the text is the answer."""
    found = _NUMBER.search(text)
    return found is not None and _decimal(found[0]) == _decimal(example.answer)


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def _json(example: "Example", text: str) -> bool:
    """The whole text is JSON for the same value, whatever its spaces and order of keys."""
    try:
        return bool(_json_value(text) == _json_value(example.answer))
    except (ValueError, RecursionError):
        return False


class _Number(NamedTuple):
    """A number in JSON: exact, however long, and unlike a bare 1 not equal to true."""

    value: Decimal


def _json_value(text: str) -> Any:
    """JSON's value, its numbers as _Number. Raises ValueError for anything that is not JSON, NaN and infinities too."""

    def number(digits: str) -> _Number:
        return _Number(Decimal(digits))

    try:
        return json.loads(text, parse_int=number, parse_float=number, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except InvalidOperation as error:
        raise ValueError("it has a number whose exponent is too large") from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _program(example: "Example", text: str) -> bool:
    return passes(f"{example.prompt}{text}\n{example.answer}\n")


_SCORERS: dict[str, Callable[["Example", str], bool]] = {
    "exact": _exact,
    "number": _number,
    "json": _json,
    "program": _program,
}
