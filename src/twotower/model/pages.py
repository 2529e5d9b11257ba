"""Keys and values in pages of a pool that many requests share. Letters: b rows, k KV heads, s new tokens, t places of a
row, p head width, n pages of the pool, m pages of a row."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from twotower.ops.transfer import to_device

# Tokens of a page: the usual block, so that a shared prefix is reused to the last whole block.
PAGE_SIZE = 16


class PastLayer(NamedTuple):
    """Cached keys and values of one attention layer: (b, k, t, p); or, where `pages` (b, m) int64 is given,
    (n, k, PAGE_SIZE, p), of which row b reads entries pages[b] one after the other."""

    key: Tensor
    value: Tensor
    pages: Tensor | None


class Past(NamedTuple):
    """Cached keys and values, one of each per attention layer, as `PastLayer` describes them."""

    keys: list[Tensor]
    values: list[Tensor]
    pages: Tensor | None

    @property
    def length(self) -> int:
        """t: how many places a row has."""
        size = self.keys[0].shape[2]
        return size if self.pages is None else size * self.pages.shape[1]

    def layer(self, index: int) -> PastLayer:
        return PastLayer(self.keys[index], self.values[index], self.pages)


@dataclasses.dataclass
class PagedKeys:
    """Rows of a pool: keys and values (n, k, PAGE_SIZE, p) of every attention layer, views of (n, PAGE_SIZE, k, p).

    `tables` hold each row's page numbers in order. They are lists that the engine extends before a pass. Padding behind
    a row's last page is written to page 0, which belongs to no row. `tip` is as in `KeyBuffer`, but a state that does
    not end there can't be extended, because pages are not copied.
    """

    keys: list[Tensor]
    values: list[Tensor]
    tables: tuple[list[int], ...]
    tip: tuple[int, ...] | None

    def past(self, used: int) -> Past:
        """The pages that hold the first `used` places of every row."""
        return Past(self.keys, self.values, self._table(-(-used // PAGE_SIZE)))

    def places(self, starts: tuple[int, ...], s: int) -> Tensor:
        """Where s new tokens after `starts` go: (b·s,) int64 among all places of the pool."""
        place = torch.tensor(starts)[:, None] + torch.arange(s)  # (b, s)
        table = self._table((max(starts) + s - 1) // PAGE_SIZE + 1, on_cpu=True)
        index = table.gather(1, place // PAGE_SIZE) * PAGE_SIZE + place % PAGE_SIZE
        return to_device(index.flatten(), self.keys[0].device)

    def append_(self, layer: int, starts: tuple[int, ...], places: Tensor | None, key: Tensor, value: Tensor) -> None:
        """Writes key and value (b, k, s, p) of one layer at `places`, see the method of that name."""
        assert places is not None
        for pool, new in ((self.keys[layer], key), (self.values[layer], value)):
            rows = pool.transpose(1, 2).flatten(0, 1)  # (n·PAGE_SIZE, k, p), a view
            rows.index_copy_(0, places, new.transpose(1, 2).flatten(0, 1))

    def reserved(self, lengths: tuple[int, ...], extra: int) -> Self:
        """This object: the owner has already extended its tables."""
        assert self.tip == lengths, "only the newest state can be extended where keys lie in pages"
        return self

    def select(self, rows: Sequence[int], lengths: tuple[int, ...]) -> "PagedKeys":
        """Some rows, which have `lengths` tokens; shares the pages."""
        return PagedKeys(self.keys, self.values, tuple(self.tables[r] for r in rows), lengths)

    def put_(self, rows: Sequence[int], newer: object, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Copies nothing: `newer` has appended to the same pages."""
        assert isinstance(newer, PagedKeys)
        assert all(self.tables[row] is table for row, table in zip(rows, newer.tables, strict=True))

    def moved(
        self, used: int, lengths: tuple[int, ...], device: torch.device | str, dtype: torch.dtype | None = None
    ) -> "PagedKeys":
        """A copy of the pages in use, on a device and with new page numbers; None keeps the dtype."""
        table = self._table(-(-used // PAGE_SIZE))
        b, m = table.shape
        pools = [[pool[table.flatten()].to(device, dtype) for pool in side] for side in (self.keys, self.values)]
        numbered = tuple(list(range(row * m, (row + 1) * m)) for row in range(b))
        return PagedKeys(pools[0], pools[1], numbered, lengths)

    def _table(self, num_pages: int, *, on_cpu: bool = False) -> Tensor:
        """The first page numbers of every row, (b, num_pages) int64; 0 behind a row's last page."""
        rows = [table[:num_pages] + [0] * (num_pages - len(table)) for table in self.tables]
        table = torch.tensor(rows, dtype=torch.long)
        return table if on_cpu else to_device(table, self.keys[0].device)


def join_pages(buffers: Sequence[PagedKeys], lengths: tuple[int, ...]) -> PagedKeys:
    """The rows of all, which have `lengths` tokens, in one object; pages of several pools are copied to a new one."""
    first = buffers[0]
    if any(b.keys is not first.keys for b in buffers):
        buffers = _in_one_pool(buffers)
        first = buffers[0]
    return PagedKeys(first.keys, first.values, tuple(table for b in buffers for table in b.tables), lengths)


def _in_one_pool(buffers: Sequence[PagedKeys]) -> list[PagedKeys]:
    """Copies of the rows' pages in one new pool, with new page numbers."""
    compact = []
    for buffer in buffers:
        assert buffer.tip is not None
        compact.append(buffer.moved(max(buffer.tip), buffer.tip, buffer.keys[0].device))
    keys, values = (
        [torch.cat(pools) for pools in zip(*sides, strict=True)]
        for sides in ([b.keys for b in compact], [b.values for b in compact])
    )
    joined, start = [], 0
    for buffer in compact:
        tables = tuple([page + start for page in table] for table in buffer.tables)
        joined.append(PagedKeys(keys, values, tables, buffer.tip))
        start += buffer.keys[0].shape[0]
    return joined
