"""A row's tokens so far, as drafters that read the text see them."""

import dataclasses
from collections.abc import Sequence
from typing import Self


class _Tokens:
    """A list of tokens that only grows, `ids`, and where each pair of tokens in it stood before.

    `before[i]` is where the pair that ends at i ended last, −1 if it is new; `latest` is where each pair ended last.
    Both know the first `len(before)` tokens, because not every drafter asks.
    """

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.before: list[int] = []
        self.latest: dict[int, int] = {}


@dataclasses.dataclass(frozen=True)
class Written:
    """The first `length` tokens of a list that other values share: those of the prompt and of the output.

    As with a `KeyBuffer`, only the newest value appends in place; extending an older one copies the list first.
    """

    tokens: _Tokens
    length: int

    @classmethod
    def of(cls, ids: Sequence[int]) -> Self:
        """The text of these tokens."""
        return cls(_Tokens(list(ids)), len(ids))

    def after(self, ids: Sequence[int]) -> Self:
        """The text with these tokens behind it."""
        tokens = self.tokens
        if len(tokens.ids) > self.length:
            tokens = _Tokens(tokens.ids[: self.length])
        tokens.ids.extend(ids)
        return dataclasses.replace(self, tokens=tokens, length=self.length + len(ids))

    @property
    def ids(self) -> list[int]:
        """The tokens; nobody may change the list."""
        ids = self.tokens.ids
        return ids if len(ids) == self.length else ids[: self.length]

    def pairs(self) -> list[int]:
        """For each token i, where the pair of tokens that ends there ended last before, −1 if it is new."""
        ids, before, latest = self.tokens.ids, self.tokens.before, self.tokens.latest
        if not before and self.length:
            before.append(-1)
        for i in range(len(before), self.length):
            pair = ids[i - 1] << 32 | ids[i]
            before.append(latest.get(pair, -1))
            latest[pair] = i
        return before
