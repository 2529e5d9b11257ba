"""Where the states of all running requests lie, under one byte budget. Letters: n pages, k KV heads, p head width."""

from twotower.model.pages import PAGE_SIZE, PagedKeys
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower


class StatePool:
    """Pages of keys and values, allocated at once, and a count of recurrent states.

    Each request that runs has one recurrent state (a slot) and a table of pages. Slots for `num_slots` requests are set
    aside first; pages have the rest of `budget` bytes. Page 0 takes padding and belongs to nobody.
    """

    def __init__(self, model: TwoTower, budget: int, num_slots: int) -> None:
        tower = model.context_tower
        self._initial = tower.initial_state(1)
        self.budget = budget
        self.slot_bytes = sum(t.nbytes for m in self._initial.mamba for t in m)
        empty = self._initial.buffer.keys
        self.page_bytes = 2 * sum(k.shape[1] * PAGE_SIZE * k.shape[3] * k.element_size() for k in empty)
        left = budget - num_slots * self.slot_bytes
        if left < 2 * self.page_bytes or left < 0:
            least = num_slots * self.slot_bytes + 2 * self.page_bytes
            raise ValueError(
                f"state_bytes is {budget}, must be at least {least} for {num_slots} requests of this model; raise it "
                "or lower max_num_requests"
            )
        # A model without attention has no pages; its tables stay empty.
        self.num_pages = left // self.page_bytes if self.page_bytes else 0
        shapes = [(self.num_pages, PAGE_SIZE, k.shape[1], k.shape[3]) for k in empty]
        # zeros, not empty: masked places are multiplied by 0 and must be finite
        make = tower.embeddings.new_zeros
        self._keys = [make(s, dtype=tower.activation_dtype).transpose(1, 2) for s in shapes]
        self._values = [make(s, dtype=tower.activation_dtype).transpose(1, 2) for s in shapes]
        self._free = list(range(self.num_pages - 1, 0, -1))
        self.num_slots_used = 0

    @property
    def bytes_used(self) -> int:
        """Bytes of pages and slots in use."""
        pages = self.num_pages - 1 - len(self._free) if self.page_bytes else 0
        return pages * self.page_bytes + self.num_slots_used * self.slot_bytes

    def pages_for(self, length: int) -> int:
        """How many pages hold `length` tokens."""
        return -(-length // PAGE_SIZE) if self.page_bytes else 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def open(self, table: list[int]) -> ContextState:
        """Takes a slot: the state before any token, whose keys will lie in the pages of `table`."""
        self.num_slots_used += 1
        buffer = PagedKeys(self._keys, self._values, (table,), (0,)) if self._keys else self._initial.buffer
        return ContextState((0,), self._initial.mamba, buffer, None)

    def close_(self, table: list[int]) -> None:
        """Gives a slot and the pages of `table` back, and empties it."""
        self.num_slots_used -= 1
        self._free.extend(table)
        table.clear()

    def grow_(self, table: list[int], length: int) -> bool:
        """Extends a table to hold `length` tokens; False, and nothing is changed, where there are too few pages."""
        missing = self.pages_for(length) - len(table)
        if missing > len(self._free):
            return False
        table.extend(self._free.pop() for _ in range(missing))
        return True
