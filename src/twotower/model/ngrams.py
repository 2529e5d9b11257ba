"""The likeliest next token after some contexts, as counts of n-grams say it: what mode `verified` can draft from
without a pass of a network.

A table holds, for contexts of 1 to `order` − 1 tokens, one token each, and backs off: of the contexts that end a text
the longest one that the table has decides (Katz 1987, without the discounts, which a draft doesn't need).
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Knuth's multiplicative hashing: the hash of n tokens is SEED·FACTOR^n + Σ token_i·FACTOR^i modulo 2^64, and the key of
# a context is the upper half of that.
FACTOR, SEED, MASK = 0x9E3779B97F4A7C15, 0x2545F4914F6CDD1D, (1 << 64) - 1
_BUCKET_BITS = 16


class Guess(NamedTuple):
    """A next token, and which share of the counts after its context it has."""

    token: int
    share: float


class _Views(NamedTuple):
    """The arrays as memory views, whose elements are Python's own integers, and where each bucket of keys begins."""

    keys: memoryview
    tokens: memoryview
    shares: memoryview
    buckets: memoryview


@dataclasses.dataclass(frozen=True)
class NgramTable:
    """Contexts of n-grams of up to `order` tokens, each with its likeliest next token.

    `keys` (n) uint32 are the contexts' hashes in ascending order, `tokens` (n) uint16 or uint32 the tokens after them,
    `shares` (n) uint8 the shares of the counts that these have, in 255ths. Two contexts of one hash are one: a draft is
    verified, so that costs a rejected token at most.
    """

    order: int
    vocab_size: int
    keys: NDArray[np.uint32]
    tokens: NDArray[np.unsignedinteger]
    shares: NDArray[np.uint8]

    @functools.cached_property
    def _views(self) -> _Views:
        starts = np.arange((1 << _BUCKET_BITS) + 1, dtype=np.int64) << (32 - _BUCKET_BITS)
        buckets = np.searchsorted(self.keys, starts)
        arrays = (self.keys, self.tokens, self.shares, buckets)
        return _Views(*(np.ascontiguousarray(a).data for a in arrays))

    def guess(self, tail: Sequence[int]) -> Guess | None:
        """The token after a text that ends with `tail`, given from its last token backwards; None if the table has no
        context that ends so."""
        keys, tokens, shares, buckets = self._views
        for key in reversed(context_keys(tail, self.order - 1)):  # the longest context that the table has
            bucket = key >> (32 - _BUCKET_BITS)
            end = buckets[bucket + 1]
            place = bisect.bisect_left(keys, key, buckets[bucket], end)
            if place < end and keys[place] == key:
                return Guess(tokens[place], shares[place] / 255)
        return None


def context_keys(tail: Sequence[int], most: int) -> list[int]:
    """The keys of the contexts of 1, 2, … `most` tokens that end a text, given from its last token backwards."""
    total, keys = SEED, []
    for token in tail[:most]:
        total = (total + token) * FACTOR & MASK
        keys.append(total >> 32)
    return keys
