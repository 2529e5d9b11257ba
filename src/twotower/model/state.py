"""What the context tower remembers. Letters: b batch, k KV heads, t places, p head width, c conv channels, w kernel,
h SSM heads, n state width."""

import dataclasses
from typing import NamedTuple, Self

import torch
from torch import Tensor

# Key lengths are rounded up to this: oneDNN compiles a kernel per shape, so a length that grows by one is slow.
KEY_TILE = 64


class MambaState(NamedTuple):
    """conv (b, w-1, c): the last rows of xBC before convolution; ssm (b, h, p, n), float32 or wider."""

    conv: Tensor
    ssm: Tensor


@dataclasses.dataclass
class KeyBuffer:
    """Preallocated keys and values (b, k, capacity, p) of every attention layer, shared by successive states.

    `tip` is each row's number of places in use by the newest state, None while scored tokens beyond it wait to be
    committed; only a state that ends at the tip may append in place.
    """

    keys: list[Tensor]
    values: list[Tensor]
    tip: tuple[int, ...] | None

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def grown(self, capacity: int, used: int) -> "KeyBuffer":
        """A copy with at least `capacity` places holding the first `used`."""
        capacity = -(-capacity // KEY_TILE) * KEY_TILE

        def grow(old: Tensor) -> Tensor:
            # zeros, not empty: masked places are multiplied by 0 and must be finite
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :used] = old[:, :, :used]
            return new

        return KeyBuffer([grow(k) for k in self.keys], [grow(v) for v in self.values], self.tip)


@dataclasses.dataclass(frozen=True)
class ContextState:
    """State of the context tower after each row's `lengths` tokens.

    `mamba` and `buffer` follow the order of the `M` and `*` layers. `next_logits` (b, v) float32 are the context
    tower's logits after the last token, None before any token. States are values: extending one leaves it usable.
    Successive states share one key buffer, which only the newest appends to; an older one copies it first.
    """

    lengths: tuple[int, ...]
    mamba: tuple[MambaState, ...]
    buffer: KeyBuffer
    next_logits: Tensor | None

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def length(self) -> int:
        """The number of tokens absorbed, where all rows agree; `lengths` has each row's."""
        if len(set(self.lengths)) != 1:
            raise ValueError(f"rows have different lengths {self.lengths}; read state.lengths")
        return self.lengths[0]

    def padded_length(self, extra: int = 0) -> int:
        """The longest row plus `extra`, rounded up to the key tile."""
        return -(-(max(self.lengths) + extra) // KEY_TILE) * KEY_TILE

    def reserve(self, extra: int) -> Self:
        """A state whose buffer has room for `extra` more tokens and belongs to it alone or ends at its tip."""
        if not self.buffer.keys:  # nothing to append to, but the next commit looks at the tip
            return dataclasses.replace(self, buffer=KeyBuffer([], [], self.lengths))
        wanted = self.padded_length(extra)
        if self.buffer.tip == self.lengths and self.buffer.capacity >= wanted:
            return self
        if self.buffer.capacity < wanted:
            wanted = max(wanted, 2 * self.buffer.capacity)  # amortises the copy
        buffer = self.buffer.grown(max(wanted, self.buffer.capacity), max(self.lengths))
        buffer.tip = self.lengths
        return dataclasses.replace(self, buffer=buffer)

    def select(self, rows: list[int]) -> Self:
        """A copy that holds only the given rows."""
        index = torch.tensor(rows, device=self.device)
        buffer = KeyBuffer(
            [k[index] for k in self.buffer.keys],
            [v[index] for v in self.buffer.values],
            tuple(self.lengths[r] for r in rows),
        )
        return dataclasses.replace(
            self,
            lengths=tuple(self.lengths[r] for r in rows),
            mamba=tuple(MambaState(m.conv[index], m.ssm[index]) for m in self.mamba),
            buffer=buffer,
            next_logits=None if self.next_logits is None else self.next_logits[index],
        )

    @property
    def device(self) -> torch.device:
        for tensor in (*self.buffer.keys, *(m.ssm for m in self.mamba)):
            return tensor.device
        return torch.device("cpu") if self.next_logits is None else self.next_logits.device

    def to(self, device: torch.device | str) -> Self:
        """This state on another device, itself if it is there already; used to seed a denoiser elsewhere."""
        if self.device == torch.device(device):
            return self
        used = min(self.padded_length(), self.buffer.capacity)
        return dataclasses.replace(
            self,
            mamba=tuple(MambaState(m.conv.to(device), m.ssm.to(device)) for m in self.mamba),
            buffer=KeyBuffer(
                [k[:, :, :used].to(device) for k in self.buffer.keys],
                [v[:, :, :used].to(device) for v in self.buffer.values],
                self.lengths,
            ),
        )
