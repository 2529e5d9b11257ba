"""What an answer is worth, from 0 to 1. A degenerate answer is worth nothing, whatever it begins with."""

import json
import re
from collections.abc import Callable

import numpy as np

from twotower.eval.sandbox import passes
from twotower.eval.tasks import Example

# A loop is text that says one thing at least so many times in a row, over at least so many characters.
_LOOP_TIMES, _LOOP_CHARACTERS = 4, 40
# Longer texts whose runs of so many words are mostly ones seen before go around in circles.
_RUN_WORDS, _FEWEST_RUNS, _DISTINCT_SHARE = 4, 40, 0.5

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


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


def score_text(example: Example, text: str) -> float:
    """1.0 for a right answer, else 0.0, by any scorer but `likelihood`, which needs the model."""
    return float(not is_degenerate(text) and _SCORERS[example.scorer](example, text))


def _exact(example: Example, text: str) -> bool:
    return text.strip() == example.answer.strip()


def _number(example: Example, text: str) -> bool:
    """The first number of the text is the answer."""
    found = _NUMBER.search(text)
    return found is not None and float(found[0].replace(",", "")) == float(example.answer)


def _json(example: Example, text: str) -> bool:
    """The whole text is JSON for the same value, whatever its spaces and order of keys."""
    try:
        return bool(json.loads(text) == json.loads(example.answer))
    except json.JSONDecodeError:
        return False


def _program(example: Example, text: str) -> bool:
    return passes(f"{example.prompt}{text}\n{example.answer}\n")


_SCORERS: dict[str, Callable[[Example, str], bool]] = {
    "exact": _exact,
    "number": _number,
    "json": _json,
    "program": _program,
}
