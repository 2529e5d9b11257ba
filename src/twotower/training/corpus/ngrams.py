"""Counts of the n-grams of a corpus, as a table that mode `verified` drafts from. Letters: p positions of the corpus,
n contexts, q pairs of a context and the token after it."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twotower.errors import SettingError
from twotower.model.ngrams import FACTOR, SEED, NgramTable
from twotower.options import check_options, option
from twotower.training.corpus.shards import Corpus

MIB = 1 << 20
# Bits of a sorting key that a token takes; the rest is the context's hash.
_TOKEN_BITS = 20
_TOKEN_MASK = (1 << _TOKEN_BITS) - 1

Positions = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramConfig:
    """Which n-grams a table has: those of up to `order` tokens, and of them the most useful that `size` bytes hold."""

    order: int = option(5, "Most tokens of an n-gram, the one to predict among them.", least=2, most=16)
    size: int = option(4 * MIB, "Most MiB of the table.", least=1, flag="--size-mib", unit=MIB)

    def __post_init__(self) -> None:
        check_options(self)


class _Level(NamedTuple):
    """The contexts of one length (n): their hashes, their `best` next tokens, how often these came and how often any
    did. `positions` (p) are sorted by context, and each context's begin at `starts` (n)."""

    hashes: NDArray[np.uint64]
    best: NDArray[np.int64]
    hits: NDArray[np.int64]
    totals: NDArray[np.int64]
    positions: Positions
    starts: Positions

    def of_each(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """A value of each context (n) at each of its positions (p)."""
        return np.repeat(values, np.diff(self.starts, append=len(self.positions)))

    def summed(self, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The number of flags (p) of each context (n)."""
        return np.add.reduceat(flags.astype(np.int64), self.starts)


def count_ngrams(corpus: Corpus, vocab_size: int, config: NgramConfig) -> NgramTable:
    """The table of a corpus: what is learnt of each row, in any context of the row, padding and prompts not predicted.

    A context is kept for what it adds: the times that its token came and the next shorter context's did not. Those of
    the largest gain are kept, and a share is that of the positions that the context decides, because longer ones decide
    the others. Holds some 60 bytes for each token of the corpus. Raises ValueError for a corpus in which no token
    follows another.
    """
    if vocab_size > _TOKEN_MASK:
        raise SettingError("vocab_size", vocab_size, f"at most {_TOKEN_MASK}", "n-grams of more tokens aren't counted")
    ids, column, scored = _flat(corpus)
    levels = list(_levels(ids, column, scored, config.order))
    if not levels:
        raise ValueError("the corpus has no token that is learnt and follows another; give one with longer rows")
    dtype: np.dtype[Any] = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    most = config.size // (np.dtype(np.uint32).itemsize + dtype.itemsize + 1)
    low, high = 0.0, float(max(level.hits.max() for level in levels)) + 1.0
    kept = _select(levels, ids, low)
    if sum(int(keep.sum()) for keep in kept) > most:
        while high - low > 1e-3 * high:  # contexts of one gain differ by their share, see `_select`
            middle = (low + high) / 2
            if sum(int(keep.sum()) for keep in _select(levels, ids, middle)) > most:
                low = middle
            else:
                high = middle
        kept = _filled(_select(levels, ids, high), _select(levels, ids, low), most)
    return _table(levels, kept, ids, config.order, vocab_size, dtype)


def _flat(corpus: Corpus) -> tuple[Positions, Positions, NDArray[np.bool_]]:
    """The ids of all rows one after the other, each one's place in its row, and whether it is learnt (p)."""
    parts = list(corpus.shards())
    ids = np.concatenate([rows.ids.reshape(-1) for rows in parts]).astype(np.int64)
    scored = np.concatenate([rows.scored.reshape(-1) for rows in parts])
    return ids, np.tile(np.arange(corpus.length), len(corpus)), scored


def _levels(ids: Positions, column: Positions, scored: NDArray[np.bool_], order: int) -> Iterator[_Level]:
    """The contexts of 1, 2, … order − 1 tokens, as `model.ngrams.context_keys` hashes them."""
    hashes = np.full(len(ids), SEED, np.uint64)
    factor, mask = np.uint64(FACTOR), np.uint64(_TOKEN_MASK)
    for length in range(1, order):
        hashes = (hashes + np.roll(ids, length).astype(np.uint64)) * factor  # modulo 2**64
        use = np.flatnonzero(scored & (column >= length))
        if not len(use):
            return
        keys = (hashes[use] & ~mask) | ids[use].astype(np.uint64)
        arranged = np.argsort(keys)
        keys, positions = keys[arranged], use[arranged]
        pairs = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))  # (q), where a pair begins
        counts = np.diff(pairs, append=len(keys))
        contexts = keys[pairs] & ~mask
        first = np.flatnonzero(np.diff(contexts, prepend=~contexts[:1]))  # (n), a context's first pair
        # the most frequent token, of equally frequent ones the first
        ranked = counts << _TOKEN_BITS | (_TOKEN_MASK - (keys[pairs] & mask).astype(np.int64))
        top = np.maximum.reduceat(ranked, first)
        best, hits = _TOKEN_MASK - (top & _TOKEN_MASK), top >> _TOKEN_BITS
        totals = np.add.reduceat(counts, first)
        yield _Level(contexts[first], best, hits, totals, positions, pairs[first])


def _select(levels: list[_Level], ids: Positions, least: float) -> list[NDArray[np.bool_]]:
    """Which contexts of each level gain at least `least`: the predictions that they put right, one at least, plus the
    share of their best token, which orders contexts of one gain."""
    predicted = np.full(len(ids), -1, np.int64)  # by the contexts kept so far
    kept = []
    for level in levels:
        positions = level.positions
        gain = level.hits - level.summed(predicted[positions] == ids[positions])
        keep = (gain >= 1) & (gain + level.hits / (level.totals + 1) >= least)
        chosen = level.of_each(np.where(keep, level.best, -1))
        predicted[positions[chosen >= 0]] = chosen[chosen >= 0]
        kept.append(keep)
    return kept


def _filled(kept: list[NDArray[np.bool_]], wanted: list[NDArray[np.bool_]], most: int) -> list[NDArray[np.bool_]]:
    """`kept`, and of what is wanted beside it as much as there is room for, short contexts first: they come again
    sooner. Most contexts were met once, and all of these gain the same."""
    room = most - sum(int(keep.sum()) for keep in kept)
    filled = []
    for keep, more in zip(kept, wanted, strict=True):
        added = np.flatnonzero(more & ~keep)[:room]
        room -= len(added)
        filled.append(keep.copy())
        filled[-1][added] = True
    return filled


def _table(
    levels: list[_Level],
    kept: list[NDArray[np.bool_]],
    ids: Positions,
    order: int,
    vocab_size: int,
    dtype: np.dtype[Any],
) -> NgramTable:
    """The kept contexts as a table."""
    deciding = np.full(len(ids), -1, np.int64)  # which kept context decides each position
    num = 0
    for level, keep in zip(levels, kept, strict=True):
        numbers = level.of_each(np.where(keep, num + np.cumsum(keep) - 1, -1))
        deciding[level.positions[numbers >= 0]] = numbers[numbers >= 0]
        num += int(keep.sum())
    keys = np.concatenate([level.hashes[keep] for level, keep in zip(levels, kept, strict=True)])
    best, hits, totals = (
        np.concatenate([getattr(level, name)[keep] for level, keep in zip(levels, kept, strict=True)])
        for name in ("best", "hits", "totals")
    )
    there = np.flatnonzero(deciding >= 0)
    decided = np.bincount(deciding[there], minlength=num)
    right = np.bincount(deciding[there], weights=ids[there] == best[deciding[there]], minlength=num)
    # one more in the denominator: what came once is not certain
    shares = np.where(decided > 0, right / (decided + 1), hits / (totals + 1))
    found, first = np.unique((keys >> np.uint64(32)).astype(np.uint32), return_index=True)
    return NgramTable(
        order, vocab_size, found, best[first].astype(dtype), np.rint(shares[first] * 255).astype(np.uint8)
    )
