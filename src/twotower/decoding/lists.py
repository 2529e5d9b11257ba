"""Settings that are lists: of token ids, of biases by token id, and of strings."""

from collections.abc import Mapping
from typing import Any

from twotower.errors import SettingError

# Largest bias of a token: e^100 outweighs every other token.
MOST_BIAS = 100.0
# Most bad words of a request: every place of a draft or block looks for each.
MOST_BAD_WORDS = 1000


def id_tuple(name: str, value: Any) -> tuple[int, ...]:
    """The token ids of a list, each once, in their order. Raises SettingError for what can be none."""
    if not isinstance(value, list | tuple):
        raise SettingError(name, value, "a list of token ids", f"write {name}=[…]")
    for place, i in enumerate(value):
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise SettingError(f"{name}[{place}]", i, "a token id, an integer of at least 0")
    return tuple(dict.fromkeys(value))


def bias_pairs(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """The (token id, bias) pairs of a mapping or of a list of pairs, in the order of the ids.

    An id may be written as a string, because JSON's keys are. Raises SettingError for ids and biases that can be none,
    and for an id that comes twice.
    """
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise SettingError(name, value, "a mapping from token ids to biases", f"write {name}={{50: -100.0}}")
    found: dict[int, float] = {}
    for key, bias in pairs:
        written = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        i = int(key) if written else key
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise SettingError(f"{name}[{key!r:.40}]", bias, "the bias of a token id, an integer of at least 0")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MOST_BIAS <= bias <= MOST_BIAS:
            raise SettingError(f"{name}[{key!r:.40}]", bias, f"a number in [-{MOST_BIAS:g}, {MOST_BIAS:g}]")
        if i in found:
            raise SettingError(name, value, f"a bias for each token, and names {i} twice", "name each id once")
        found[i] = float(bias)
    return tuple(sorted(found.items()))


def text_tuple(name: str, value: Any) -> tuple[str, ...]:
    """The strings of a list. Raises SettingError for an empty one and for what is no list of strings."""
    if not isinstance(value, list | tuple) or not all(isinstance(s, str) and s for s in value):
        raise SettingError(name, value, "a list of texts that are not empty", f"write {name}=('…',)")
    return tuple(value)


def parse_biases(text: str) -> tuple[tuple[str, float], ...]:
    """The pairs of a text such as "50=-100,7=2.5", from the command line. Raises SettingError for other texts."""
    pairs = []
    for part in text.split(",") if text else ():
        key, _, bias = part.partition("=")
        try:
            pairs.append((key.strip(), float(bias)))
        except ValueError as error:
            rule = "token ids with their biases and commas between them, such as 50=-100,7=2.5"
            raise SettingError("logit_bias", text, rule) from error
    return tuple(pairs)
