import collections
import itertools
from pathlib import Path

import numpy as np
import pytest

from twotower.errors import SettingError
from twotower.model.ngrams import NgramTable, context_keys
from twotower.training.corpus.ngrams import NgramConfig, count_ngrams
from twotower.training.corpus.shards import Corpus, CorpusRows, write_shard


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Two shards of rows that follow a rule with exceptions; the first tokens of each row aren't learnt."""
    rng = np.random.default_rng(0)
    for shard in range(2):
        ids = np.zeros((20, 24), np.int32)
        for row in ids:
            row[:3] = rng.integers(0, 12, 3)
            for i in range(3, 24):
                row[i] = (row[i - 1] + 2 * row[i - 3]) % 12 if rng.random() < 0.8 else rng.integers(0, 12)
        scored = np.zeros_like(ids, dtype=bool)
        scored[:, 4:] = True
        write_shard(tmp_path / f"{shard}.safetensors", CorpusRows(ids, scored, np.zeros_like(ids)))
    return Corpus(tmp_path, vocab_size=12)


def counted(corpus: Corpus, length: int) -> dict[tuple[int, ...], collections.Counter]:
    """What follows each context of so many tokens."""
    found: dict[tuple[int, ...], collections.Counter] = collections.defaultdict(collections.Counter)
    for row in map(corpus.row, range(len(corpus))):
        for i in np.flatnonzero(row.scored):
            if i >= length:
                found[tuple(row.ids[i - length : i].tolist())][int(row.ids[i])] += 1
    return found


def best(counts: collections.Counter) -> int:
    return min(counts, key=lambda token: (-counts[token], token))


def key(context: tuple[int, ...]) -> int:
    return [*context_keys(context[::-1], len(context))][-1]


def plain(corpus: Corpus, order: int) -> dict[int, int]:
    """The contexts worth keeping, by key, with their tokens: those that put right what a shorter one gets wrong."""
    kept: dict[tuple[int, ...], int] = {}
    for length in range(1, order):
        level = {}
        for context, counts in counted(corpus, length).items():
            shorter = next((kept[context[n:]] for n in range(1, length) if context[n:] in kept), None)
            if counts[best(counts)] > (0 if shorter is None else counts[shorter]):
                level[context] = best(counts)
        kept |= level
    return {key(context): token for context, token in kept.items()}


@pytest.mark.parametrize("order", [2, 3, 5])
def test_a_table_has_the_contexts_that_a_plain_count_finds(order: int, corpus: Corpus) -> None:
    found = count_ngrams(corpus, 12, NgramConfig(order=order))
    assert (found.keys.dtype, found.tokens.dtype) == (np.uint32, np.uint16)
    assert dict(zip(found.keys.tolist(), found.tokens.tolist(), strict=True)) == plain(corpus, order)


def right(table: NgramTable, corpus: Corpus) -> list[tuple[bool, float]]:
    """For every learnt token with a guess: whether that is right, and its share."""
    found = []
    for row in map(corpus.row, range(len(corpus))):
        for i in np.flatnonzero(row.scored):
            guess = table.guess(row.ids[:i][::-1].tolist())
            if guess is not None:
                found.append((guess.token == row.ids[i], guess.share))
    return found


def test_shares_say_how_often_a_guess_is_right(corpus: Corpus) -> None:
    guesses = right(count_ngrams(corpus, 12, NgramConfig(order=3)), corpus)
    assert len(guesses) == 40 * 20
    for low, high in itertools.pairwise((0.0, 0.4, 0.6, 1.0)):
        hits = [hit for hit, share in guesses if low <= share < high]
        shares = [share for _, share in guesses if low <= share < high]
        # below by what one more count in the denominator takes
        assert 0 <= np.mean(hits) - np.mean(shares) < 0.4


def test_a_small_table_keeps_what_gains_most(corpus: Corpus) -> None:
    whole = count_ngrams(corpus, 12, NgramConfig(order=4))
    config = NgramConfig(order=4)
    object.__setattr__(config, "size", 7 * 40)  # a MiB holds all of these
    small = count_ngrams(corpus, 12, config)
    assert len(small.keys) == 40 < len(whole.keys)
    hits = sum(hit for hit, _ in right(small, corpus))
    rng = np.random.default_rng(0)
    some = np.sort(rng.choice(len(whole.keys), len(small.keys), replace=False))
    random_table = NgramTable(4, 12, whole.keys[some], whole.tokens[some], whole.shares[some])
    assert hits > 1.5 * sum(hit for hit, _ in right(random_table, corpus))


def test_what_cannot_be_counted_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="order is 1, must be an integer in \\[2, 16\\]"):
        NgramConfig(order=1)
    with pytest.raises(SettingError, match="vocab_size"):
        count_ngrams(corpus, 1 << 21, NgramConfig())
    nothing = CorpusRows(np.zeros((2, 4), np.int32), np.zeros((2, 4), bool), np.zeros((2, 4), np.int32))
    write_shard(tmp_path / "none" / "0.safetensors", nothing)
    with pytest.raises(ValueError, match="no token that is learnt"):
        count_ngrams(Corpus(tmp_path / "none", vocab_size=12), 12, NgramConfig())
