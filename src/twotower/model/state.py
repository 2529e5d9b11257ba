"""The state of the context tower: cached keys and values, and recurrent states. Letters: b batch, k KV heads, p head
width, c conv channels, w conv kernel, h SSM heads, n state width."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from twotower.model.pages import PagedKeys, Past, join_pages
from twotower.ops.transfer import to_device

# Key lengths are rounded up to this: oneDNN compiles a kernel per shape, so a length that grows by one is slow.
KEY_TILE = 64


class MambaState(NamedTuple):
    """conv (b, w-1, c): the last rows of what is convolved; ssm (b, h, p, n), or (b, c, n) of `SelectiveMixer`, float32
    or wider."""

    conv: Tensor
    ssm: Tensor


@dataclasses.dataclass
class KeyBuffer:
    """Preallocated keys and values (b, k, capacity, p) of every attention layer, shared by successive states.

    `tip` is the number of places that the newest state uses in each row; it is None between a causal pass, which has
    already written keys behind it, and the pass's commit. Only a state that ends at the tip may append in place.
    """

    keys: list[Tensor]
    values: list[Tensor]
    tip: tuple[int, ...] | None
    # The last answer of `past`. Autograd forbids views older than what PyTorch writes, so whoever writes drops it.
    _past: tuple[int, Past] | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def past(self, used: int) -> Past:
        """The first `used` places of every row."""
        if self._past is None or self._past[0] != used:
            past = Past([k[:, :, :used] for k in self.keys], [v[:, :, :used] for v in self.values], None)
            self._past = used, past
        return self._past[1]

    def places(self, starts: tuple[int, ...], s: int) -> None:
        """None: keys of a row lie side by side, so `starts` says where to append (pages need explicit places)."""

    def append_(self, layer: int, starts: tuple[int, ...], places: Tensor | None, key: Tensor, value: Tensor) -> None:
        """Writes key and value (b, k, s, p) of one layer at each row's places from starts[b] on."""
        keys, values, s = self.keys[layer], self.values[layer], key.shape[2]
        self._past = None
        if len(set(starts)) == 1:
            keys[:, :, starts[0] : starts[0] + s] = key
            values[:, :, starts[0] : starts[0] + s] = value
        else:
            for row, start in enumerate(starts):
                keys[row, :, start : start + s] = key[row]
                values[row, :, start : start + s] = value[row]

    def reserved(self, lengths: tuple[int, ...], extra: int) -> Self | "KeyBuffer":
        """A buffer with room for `extra` tokens after `lengths`: this one, or a copy if it is too small or a newer
        state has appended to it."""
        wanted = padded(max(lengths) + extra)
        if self.tip == lengths and self.capacity >= wanted:
            return self
        if self.capacity < wanted:
            wanted = max(wanted, 2 * self.capacity)  # amortises the copy
        buffer = self.grown(max(wanted, self.capacity), max(lengths))
        buffer.tip = lengths
        return buffer

    def select(self, rows: Sequence[int], lengths: tuple[int, ...]) -> "KeyBuffer":
        """A copy of some rows, which have `lengths` tokens."""
        index = to_device(rows, self.keys[0].device) if self.keys else None
        return KeyBuffer([k[index] for k in self.keys], [v[index] for v in self.values], lengths)

    def put_(
        self, rows: Sequence[int], newer: "KeyBuffer | PagedKeys", starts: Sequence[int], ends: Sequence[int]
    ) -> None:
        """Copies what `newer`, a copy of these rows, has appended: places starts[i] to ends[i] of its row i."""
        assert isinstance(newer, KeyBuffer)
        self._past = None
        for ours, theirs in zip((*self.keys, *self.values), (*newer.keys, *newer.values), strict=True):
            for i, row in enumerate(rows):
                ours[row, :, starts[i] : ends[i]] = theirs[i, :, starts[i] : ends[i]]

    def moved(self, used: int, lengths: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> "KeyBuffer":
        """A copy of the first `used` places, on a device and in a dtype."""
        keys, values, _ = self.past(used)
        return KeyBuffer([k.to(device, dtype) for k in keys], [v.to(device, dtype) for v in values], lengths)

    def grown(self, capacity: int, used: int) -> "KeyBuffer":
        """A copy with at least `capacity` places holding the first `used`."""
        capacity = padded(capacity)

        def grow(old: Tensor) -> Tensor:
            # zeros, not empty: masked places are multiplied by 0 and must be finite
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :used] = old[:, :, :used]
            return new

        return KeyBuffer([grow(k) for k in self.keys], [grow(v) for v in self.values], self.tip)


def padded(length: int) -> int:
    """`length` rounded up to the key tile."""
    return -(-length // KEY_TILE) * KEY_TILE


@dataclasses.dataclass(frozen=True)
class ContextState:
    """State of the context tower after each row's `lengths` tokens.

    `mamba` follows the order of the recurrent layers, `buffer` that of the `*` layers. `next_logits`
    (b, vocabulary), float32 or wider, are the context tower's logits after the last token, None before any token.
    `rope_lengths` are for each row the `TwoTowerConfig.rope_length` of the text that it is planned to become. States
    are values: extending one leaves it usable.
    Successive states share one key buffer, to which only the newest appends; extending an older one copies the buffer
    first. Keys in pages of a pool are never copied, so there only the newest state can be extended.
    """

    lengths: tuple[int, ...]
    mamba: tuple[MambaState, ...]
    buffer: KeyBuffer | PagedKeys
    next_logits: Tensor | None
    rope_lengths: tuple[int, ...]

    @property
    def batch_size(self) -> int:
        """Rows b."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """The number of tokens absorbed, where all rows agree; `lengths` has each row's."""
        if len(set(self.lengths)) != 1:
            raise ValueError(f"rows have different lengths {self.lengths}; read state.lengths")
        return self.lengths[0]

    def padded_length(self, extra: int = 0) -> int:
        """The longest row plus `extra`, rounded up to the key tile."""
        return padded(max(self.lengths) + extra)

    def reserve(self, extra: int) -> Self:
        """This state with room in its buffer for `extra` more tokens, which it may append in place."""
        if not self.buffer.keys:  # no attention layers, but the next commit sets and checks the tip
            return dataclasses.replace(self, buffer=KeyBuffer([], [], self.lengths))
        buffer = self.buffer.reserved(self.lengths, extra)
        return self if buffer is self.buffer else dataclasses.replace(self, buffer=buffer)

    def select(self, rows: Sequence[int]) -> Self:
        """A copy that holds only the given rows; keys in pages are shared, not copied."""
        lengths = tuple(self.lengths[r] for r in rows)
        return dataclasses.replace(
            self,
            lengths=lengths,
            mamba=tuple(MambaState(rows_of(m.conv, rows), rows_of(m.ssm, rows)) for m in self.mamba),
            buffer=self.buffer.select(rows, lengths),
            next_logits=None if self.next_logits is None else rows_of(self.next_logits, rows),
            rope_lengths=tuple(self.rope_lengths[r] for r in rows),
        )

    def put(self, rows: Sequence[int], newer: Self) -> Self:
        """This state with some rows replaced by `newer`, which was selected from them and has been extended since.

        Keys are appended in place if they can be, as in an extension; `next_logits` is None unless `newer` has it.
        """
        lengths = list(self.lengths)
        for row, length in zip(rows, newer.lengths, strict=True):
            lengths[row] = length
        starts = [self.lengths[r] for r in rows]
        state = self.reserve(max(n - s for n, s in zip(newer.lengths, starts, strict=True)))
        state.buffer.put_(rows, newer.buffer, starts, newer.lengths)
        state.buffer.tip = tuple(lengths)
        mamba = tuple(
            MambaState(_with_rows(old.conv, rows, new.conv), _with_rows(old.ssm, rows, new.ssm))
            for old, new in zip(self.mamba, newer.mamba, strict=True)
        )
        logits = newer.next_logits
        if logits is not None:
            before = _no_logits(logits, self.batch_size) if self.next_logits is None else self.next_logits
            logits = _with_rows(before, rows, logits)
        return dataclasses.replace(state, lengths=tuple(lengths), mamba=mamba, next_logits=logits)

    @property
    def device(self) -> torch.device:
        """Where the state's tensors are."""
        for tensor in (*self.buffer.keys, *(m.ssm for m in self.mamba)):
            return tensor.device
        return torch.device("cpu") if self.next_logits is None else self.next_logits.device

    def to(self, device: torch.device | str, dtype: torch.dtype, key_dtype: torch.dtype) -> Self:
        """This state on the denoiser's device, for its activations of `dtype` and its keys and values of `key_dtype`:
        itself, or a copy in which `next_logits` stay where they are."""
        same = all(m.conv.dtype == dtype for m in self.mamba) and all(k.dtype == key_dtype for k in self.buffer.keys)
        if same and self.device == torch.device(device):
            return self
        return dataclasses.replace(
            self,
            mamba=tuple(MambaState(m.conv.to(device, dtype), m.ssm.to(device)) for m in self.mamba),
            buffer=self.buffer.moved(self.padded_length(), self.lengths, device, key_dtype),
        )


# Rows are copied one by one on a CPU: for all at once PyTorch wakes its threads from some tens of thousands of numbers
# on, and these then hold a core for milliseconds that the C kernels' threads need.


def rows_of(table: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows (n, …) of a table (b, …)."""
    if table.device.type != "cpu":
        return table[to_device(rows, table.device)]
    return torch.cat([table[:0], *(table[r : r + 1] for r in rows)])


def _with_rows(table: Tensor, rows: Sequence[int], newer: Tensor) -> Tensor:
    """A copy of a table (b, …) with some rows replaced by those of `newer` (n, …)."""
    if table.device.type != "cpu":
        return table.index_copy(0, to_device(rows, table.device), newer)
    parts = list(table.split(1))
    for row, part in zip(rows, newer.split(1), strict=True):
        parts[row] = part
    return torch.cat(parts)


def _no_logits(like: Tensor, num_rows: int) -> Tensor:
    """Zeros (num_rows, v) for rows without logits, to be copied."""
    return like.new_zeros(1, like.shape[1]).expand(num_rows, -1)


def _stacked(tables: Sequence[Tensor]) -> Tensor:
    """Tables (…) as one, one behind the other."""
    if tables[0].device.type != "cpu":
        return torch.cat(list(tables))
    return torch.cat([row for table in tables for row in table.split(1)])


def join(states: Sequence[ContextState]) -> ContextState:
    """One state with the rows of all, in order. Their keys must lie in pages."""
    first = states[0]
    mamba = tuple(
        MambaState(_stacked([m.conv for m in layer]), _stacked([m.ssm for m in layer]))
        for layer in zip(*(s.mamba for s in states), strict=True)
    )
    logits = None
    known = next((s.next_logits for s in states if s.next_logits is not None), None)
    if known is not None:  # rows without logits get zeros, which nobody reads
        logits = _stacked([_no_logits(known, s.batch_size) if s.next_logits is None else s.next_logits for s in states])
    lengths = tuple(n for s in states for n in s.lengths)
    ropes = tuple(n for s in states for n in s.rope_lengths)
    tables = [s.buffer for s in states if isinstance(s.buffer, PagedKeys)]
    if not first.buffer.keys:
        return ContextState(lengths, mamba, KeyBuffer([], [], lengths), logits, ropes)
    assert len(tables) == len(states), "only keys in pages can be joined"
    return ContextState(lengths, mamba, join_pages(tables, lengths), logits, ropes)
