import random

import numpy as np

from twotower.model.ngrams import NgramTable, context_keys


def table(contexts: dict[tuple[int, ...], tuple[int, float]], order: int = 4) -> NgramTable:
    """A table of contexts, the newest token last, each with its next token and that one's share."""
    rows = sorted(([*context_keys(c[::-1], len(c))][-1], *guess) for c, guess in contexts.items())
    keys, tokens, shares = zip(*rows, strict=True)
    rounded = np.rint(np.array(shares) * 255)
    return NgramTable(order, 9, np.array(keys, np.uint32), np.array(tokens, np.uint16), rounded.astype(np.uint8))


def test_the_longest_context_that_ends_the_text_decides() -> None:
    found = table({(1,): (5, 0.2), (2, 1): (6, 0.4), (3, 2, 1): (7, 1.0), (4,): (8, 0.6)})
    for text, token, share in (
        ([1], 5, 0.2),
        ([4, 1], 5, 0.2),
        ([2, 1], 6, 0.4),
        ([0, 3, 2, 1], 7, 1.0),
        ([4], 8, 0.6),
    ):
        guess = found.guess(text[::-1])
        assert guess is not None
        assert guess.token == token
        assert abs(guess.share - share) < 1 / 255
    assert found.guess([2]) is None
    assert found.guess([]) is None
    # a context that has a shorter one missing between is found too
    assert table({(3, 2, 1): (7, 1.0)}).guess([1, 2, 3]) == (7, 1.0)


def test_guesses_are_those_of_a_plain_search() -> None:
    """Many keys, so that every bucket of the index has several, and texts of which most have no context."""
    rng = random.Random(0)
    contexts = {
        tuple(rng.randrange(200) for _ in range(rng.randint(1, 3))): (rng.randrange(9), 1.0) for _ in range(3000)
    }
    found = table(contexts)
    for _ in range(2000):
        text = [rng.randrange(200) for _ in range(5)]
        longest = next((contexts[tuple(text[-n:])] for n in (3, 2, 1) if tuple(text[-n:]) in contexts), None)
        assert found.guess(text[::-1]) == longest
