"""Memory for the states of all running requests, within one byte budget."""

import math
import mmap
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from twotower.engine.config import MIB
from twotower.model.pages import PAGE_SIZE, PagedKeys
from twotower.model.state import ContextState, KeyBuffer, MambaState
from twotower.model.two_tower import TwoTower


class StatePool:
    """Pages of keys and values, allocated at once, and a count of recurrent states.

    Each running request has one recurrent state (a slot) and a table of pages. Slots for `num_slots` requests are set
    aside first; the rest of `budget` bytes is for pages. A page may be in several tables and in the prefix cache, and
    is free when it is in none; only one request may append to it. Page 0 is never allocated: padding is written to it.
    """

    def __init__(self, model: TwoTower, budget: int, num_slots: int) -> None:
        tower = model.context_tower
        self._initial = tower.initial_state(1)
        self.slot_bytes = sum(t.nbytes for m in self._initial.mamba for t in m)
        empty = self._initial.buffer.keys
        self.page_bytes = 2 * sum(k.shape[1] * PAGE_SIZE * k.shape[3] * k.element_size() for k in empty)
        assert budget >= num_slots * self.slot_bytes + 2 * self.page_bytes, "`plan_memory` gives a pool enough"
        # A model without attention has no pages; its tables stay empty.
        self.num_pages = (budget - num_slots * self.slot_bytes) // self.page_bytes if self.page_bytes else 1
        shapes = [(self.num_pages, PAGE_SIZE, k.shape[1], k.shape[3]) for k in empty]
        device = tower.embeddings.device
        try:
            self._keys = [_zeros(s, empty[0].dtype, device).transpose(1, 2) for s in shapes]
            self._values = [_zeros(s, empty[0].dtype, device).transpose(1, 2) for s in shapes]
        except (RuntimeError, OSError, OverflowError) as error:  # PyTorch's, of every device, and the system's
            raise ValueError(
                f"{budget / MIB:.0f} MiB for the states of running requests can't be allocated on "
                f"{device}; lower state_bytes (--state-mib)"
            ) from error
        self._free = list(range(self.num_pages - 1, 0, -1))
        self._uses = [0] * self.num_pages
        self._num_tables = [0] * self.num_pages  # that hold a page
        self._num_in_tables = 0
        self._num_slots, self._num_slots_used = num_slots, 0

    @property
    def bytes_used(self) -> int:
        """Bytes of pages and slots in use."""
        pages = self.num_pages - 1 - len(self._free)
        return pages * self.page_bytes + self._num_slots_used * self.slot_bytes

    @property
    def usage(self) -> float:
        """The fraction of all pages that are in a table, or of slots in use for a model without pages.

        Pages that only the prefix cache holds don't count, for they can be freed.
        """
        if self.num_pages > 1:
            return self._num_in_tables / (self.num_pages - 1)
        return self._num_slots_used / self._num_slots

    @property
    def num_free(self) -> int:
        """The number of unused pages."""
        return len(self._free)

    @property
    def num_tokens(self) -> int | None:
        """The most tokens whose keys there is room for; None for a model without keys."""
        return (self.num_pages - 1) * PAGE_SIZE if self.page_bytes else None

    def pages_for(self, length: int) -> int:
        """The number of pages that `length` tokens need."""
        return -(-length // PAGE_SIZE) if self.page_bytes else 0

    def open(
        self,
        table: list[int],
        length: int,
        mamba: tuple[MambaState, ...],
        logits: Tensor | None,
        rope_length: int,
    ) -> ContextState:
        """Takes a slot and returns the state after `length` tokens, whose keys are in the pages of `table`.

        `mamba` and `logits` are the state's recurrent part and next logits; at length 0 `mamba` is ignored.
        `rope_length` is that of the text that it is planned to become.
        """
        keys = PagedKeys(self._keys, self._values, (table,), (length,)) if self._keys else KeyBuffer([], [], (length,))
        state = ContextState((length,), mamba if length else self._initial.mamba, keys, logits, (rope_length,))
        self._num_slots_used += 1
        return state

    def close_(self, table: list[int]) -> None:
        """Frees a slot and the pages of `table`, and empties the table."""
        self._num_slots_used -= 1
        self.release_(table)

    def release_(self, table: list[int]) -> None:
        """Frees the pages of `table`, and empties it."""
        for page in table:
            self._num_tables[page] -= 1
            self._num_in_tables -= self._num_tables[page] == 0
            self.drop_(page)
        table.clear()

    def grow_(self, table: list[int], length: int) -> bool:
        """Extends a table to hold `length` tokens; returns False and changes nothing if too few pages are free."""
        missing = self.pages_for(length) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            self.extend_(table, [self._free.pop()])
        return True

    def extend_(self, table: list[int], pages: Sequence[int]) -> None:
        """Adds pages to a table, which holds them as well from now on."""
        for page in pages:
            table.append(page)
            self._num_in_tables += self._num_tables[page] == 0
            self._num_tables[page] += 1
            self.hold_(page)

    def copy_page_(self, source: int, target: int) -> None:
        """Copies the keys and values of page `source` to page `target`."""
        for pool in (*self._keys, *self._values):
            pool[target].copy_(pool[source])

    def hold_(self, page: int) -> None:
        """Adds one use of a page."""
        self._uses[page] += 1

    def drop_(self, page: int) -> None:
        """Removes one use of a page; removing the last one frees it."""
        assert self._uses[page] > 0
        self._uses[page] -= 1
        if self._uses[page] == 0:
            self._free.append(page)

    def recount_(self, tables: Sequence[Sequence[int]], cached: Iterable[int], num_slots: int) -> None:
        """Counts anew what is in use: the pages of `tables` and those of the prefix cache's nodes, and `num_slots`.

        For when an exception may have struck between two counts that belong together.
        """
        self._num_tables = [0] * self.num_pages
        for page in (page for table in tables for page in table):
            self._num_tables[page] += 1
        self._uses = list(self._num_tables)
        for page in cached:
            self._uses[page] += 1
        self._num_in_tables = sum(count > 0 for count in self._num_tables)
        self._free = [page for page in range(self.num_pages - 1, 0, -1) if self._uses[page] == 0]
        self._num_slots_used = num_slots

    def num_uses(self, page: int) -> int:
        """The number of tables and prefix cache nodes that hold a page."""
        return self._uses[page]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, for masked places are multiplied by 0 and must be finite.

    On a CPU they take no memory until they are written, unlike `torch.zeros`, which writes them all.
    """
    if device.type != "cpu" or 0 in shape or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)
