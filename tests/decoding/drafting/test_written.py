import random

from twotower.decoding.drafting.written import Written


def test_an_older_text_goes_its_own_way() -> None:
    first = Written.of([1, 2])
    second = first.after([3])
    assert second.tokens is first.tokens, "the newest appends in place"
    other = first.after([4, 5])
    assert (first.ids, second.ids, other.ids) == ([1, 2], [1, 2, 3], [1, 2, 4, 5])


def test_pairs_are_where_the_same_two_tokens_ended_before() -> None:
    rng = random.Random(0)
    text, ids = Written.of([]), []
    for _ in range(60):
        new = [rng.randrange(3) for _ in range(rng.randint(0, 4))]
        text, ids = text.after(new), ids + new
        expected = [
            next((j for j in range(i - 1, 0, -1) if ids[j - 1 : j + 1] == ids[i - 1 : i + 1]), -1) if i else -1
            for i in range(len(ids))
        ]
        assert text.pairs() == expected
