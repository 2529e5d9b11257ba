"""Texts that are never completed, as sequences of token ids."""

from collections.abc import Iterator, Sequence

from twotower.decoding.prompt import text_ids
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower


def word_sequences(model: TwoTower, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The token ids of bad words, each as it begins a text, as it follows a space where that takes other tokens but as
    many, like vLLM's, and as it follows another character, because a tokenizer may begin every text with a space.

    Raises SettingError for a word without tokens and for a model without a tokenizer.
    """
    if not words:
        return ()
    if model.tokenizer is None:
        raise SettingError("bad_words", words, "empty for a checkpoint without a tokenizer.json", "drop it")
    found = []
    for place, word in enumerate(words):
        word = word.lstrip() or word
        plain = text_ids(model, word, "bad_words")
        if not plain:
            raise SettingError(f"bad_words[{place}]", word, "a text of at least one token")
        found.append(plain)
        spaced = text_ids(model, " " + word, "bad_words")
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
        line = text_ids(model, "\n", "bad_words")
        inside = text_ids(model, "\n" + word, "bad_words")
        if inside[: len(line)] == line and len(inside) > len(line):
            found.append(inside[len(line) :])
    return tuple(dict.fromkeys(found))


def finishing(words: Sequence[Sequence[int]], tokens: Sequence[int | None], first: int) -> Iterator[tuple[int, int]]:
    """The places of a text and the tokens that must not come there, so that no word is ever complete.

    Masked places of the text are None. A word that ends at place `first` or later and disagrees with no token has its
    token kept away from its rightmost masked place: from left to right that is its last token after its beginning, and
    in a block no order of commits can complete it.
    """
    for word in words:
        for end in range(max(first, len(word) - 1), len(tokens)):
            start = end - len(word) + 1
            if all(tokens[start + n] in (None, i) for n, i in enumerate(word)):
                last = max((n for n in range(len(word)) if tokens[start + n] is None), default=None)
                if last is not None:
                    yield start + last, word[last]
