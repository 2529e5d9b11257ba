"""Judges the answers of tasks: 1.0 for a right one, else 0.0. A degenerate answer is wrong, whatever it begins with."""

import ast
import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import numpy as np

from twotower.eval.sandbox import passes

# `exact`, `number` and `json` compare a reply with the answer, `program` runs it with the answer as its tests, and
# `likelihood` asks the context tower.
Scorer = Literal["exact", "number", "json", "likelihood", "program"]
SCORERS: tuple[str, ...] = get_args(Scorer)

# A text loops where it repeats itself at least _LOOP_TIMES times in a row, over at least _LOOP_CHARACTERS characters.
_LOOP_TIMES, _LOOP_CHARACTERS = 4, 40
# A text with at least _FEWEST_RUNS runs of _RUN_WORDS words is degenerate if less than this share of them is distinct.
_RUN_WORDS, _FEWEST_RUNS, _DISTINCT_SHARE = 4, 40, 0.5

# A comma belongs to a number only between thousands: "1,200" is one number, "3,4" are two.
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def is_degenerate(text: str) -> bool:
    """Whether a text loops anywhere, or repeats most of its runs of four words."""
    words = text.split()
    runs = [tuple(words[i : i + _RUN_WORDS]) for i in range(len(words) - _RUN_WORDS + 1)]
    if len(runs) >= _FEWEST_RUNS and len(set(runs)) < _DISTINCT_SHARE * len(runs):
        return True
    letters = np.array([ord(letter) for word in words for letter in f"{word} "], dtype=np.int64)
    return any(_loops(letters, period) for period in range(1, len(letters) // _LOOP_TIMES + 1))


def _loops(letters: np.ndarray, period: int) -> bool:
    """Whether letters[i] = letters[i - period] holds over a stretch that is long enough for a loop."""
    changes = np.flatnonzero(letters[period:] != letters[:-period])
    edges = np.concatenate(([-1], changes, [len(letters) - period]))
    longest = int(np.diff(edges).max()) - 1 + period
    return longest >= max(_LOOP_TIMES * period, _LOOP_CHARACTERS)


def check_answer(scorer: Scorer, answer: str, stop: Sequence[str]) -> None:
    """Raises ValueError for an answer that no reply, which ends before any of `stop`, can match."""
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
    needed = ""  # text that stands in every reply that matches
    if scorer == "exact":
        needed = answer.strip()
    elif scorer == "number" and _decimal(answer) != _decimal(answer).to_integral_value():
        needed = "."
    cut = [end for end in stop if end in needed]
    if cut:
        raise ValueError(f"answer is {answer!r}, but replies end before stop {cut[0]!r}; drop it from one of the two")
    if scorer == "exact" and is_degenerate(answer):
        raise ValueError(
            f"answer is {answer!r}, which is a loop, and replies that loop are wrong; ask for something else"
        )


def judge(scorer: Scorer, answer: str, reply: str, prompt: str = "") -> float:
    """1.0 if a reply to `prompt` is right, else 0.0. Never raises for what a reply says.

    Every scorer but `likelihood`, for which the model itself is needed, can judge.
    """
    if is_degenerate(reply):
        return 0.0
    if scorer == "program":
        return float(passes(f"{prompt}{reply}\n{answer}\n"))
    return float(_COMPARISONS[scorer](answer, reply))


def _exact(answer: str, reply: str) -> bool:
    return reply.strip() == answer.strip()


def _number(answer: str, reply: str) -> bool:
    """Whether the first number of the reply is the answer."""
    found = _NUMBER.search(reply)
    return found is not None and _decimal(found[0]) == _decimal(answer)


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def _json(answer: str, reply: str) -> bool:
    """Whether the whole reply is JSON for the same value, whatever its spaces and the order of its keys."""
    try:
        return bool(_json_value(reply) == _json_value(answer))
    except (ValueError, RecursionError):
        return False


class _Number(NamedTuple):
    """A number in JSON, exact however long it is. Unlike a Python 1, it is not equal to True."""

    value: Decimal


def _json_value(text: str) -> Any:
    """The value of a JSON text, with numbers as _Number. Raises ValueError for anything else, NaN included."""

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


_COMPARISONS: dict[str, Callable[[str, str], bool]] = {"exact": _exact, "number": _number, "json": _json}
