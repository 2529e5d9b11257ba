"""`S` and `R` mixers in the training pass, a few chunks at a time.

Letters: b batch, t tokens, d width, c chunks, q places of a chunk, k blocks of a chunk, s places of a block,
m channels, n state width.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from twotower.model.selective import SelectiveMixer
from twotower.ops import seeded_selective
from twotower.ops.chunks import Chunks, take
from twotower.ops.seeded_conv import RowReach, seeded_conv
from twotower.ops.seeded_selective import Reach
from twotower.ops.selective_scan import SelectiveInputs
from twotower.training.forward.recompute import maybe_recomputed

T = TypeVar("T")

# Numbers in the states that exist at once: 64 MB of float32, several times of which a group of chunks holds
GROUP = 1 << 24


class SelectiveSeed(NamedTuple):
    """The context tower's side of one layer: the gate z (b, t, m), for its own output only, what is convolved
    (b, t, channels), the scan's inputs, A (m, n), and the state before each chunk (b, c, m, n)."""

    z: Tensor
    rows: Tensor
    inputs: SelectiveInputs
    A: Tensor
    states: Tensor


def selective_seed(mixer: SelectiveMixer, x: Tensor, rows: RowReach, chunks: Chunks) -> SelectiveSeed:
    """The context tower's side, from its normed inputs x (b, t, d)."""
    z, convolved = mixer.split(x)
    inputs = _laid(mixer, convolved, None, rows, chunks.token, chunks.filled)
    A, fresh = mixer.core.A, _reach(chunks, x.shape[0]).fresh
    ends = [
        _recomputed(seeded_selective.chunk_ends, inputs.pieces(group), A, fresh[:, group])
        for group in _groups(inputs.u.shape, A)
    ]
    state = torch.zeros_like(ends[0][0][:, 0])
    states = []
    for added, kept in ((a, k) for end in ends for a, k in zip(*(part.unbind(1) for part in end), strict=True)):
        states.append(state)
        state = torch.addcmul(added, kept, state)
    return SelectiveSeed(z, convolved, inputs, A, torch.stack(states, dim=1))


def selective_context(mixer: SelectiveMixer, seed: SelectiveSeed, chunks: Chunks, dtype: torch.dtype) -> Tensor:
    """The context layer's own output (b, t, d)."""
    fresh = _reach(chunks, seed.z.shape[0]).fresh
    pieces = [
        _recomputed(
            seeded_selective.context_output, seed.inputs.pieces(group), seed.A, seed.states[:, group], fresh[:, group]
        )
        for group in _groups(seed.inputs.u.shape, seed.A)
    ]
    return mixer.output(take(torch.cat(pieces, dim=1).flatten(1, 2), chunks.place), seed.z, dtype)


def selective_blocks(
    mixer: SelectiveMixer, x: Tensor, seed: SelectiveSeed, rows: RowReach, chunks: Chunks, dtype: torch.dtype
) -> Tensor:
    """The denoiser layer's output (b, t, d) for its normed inputs x (b, t, d)."""
    z, convolved = mixer.split(x)
    inputs = _laid(mixer, convolved, seed.rows, rows, chunks.block_token, chunks.block_filled)
    A, reach = mixer.core.A, _reach(chunks, x.shape[0])
    pieces = []
    for group in _groups(seed.inputs.u.shape, A):
        seeds = seed.inputs.pieces(group), seed.A, seed.states[:, group], Reach(*(part[:, group] for part in reach))
        pieces.append(_recomputed(seeded_selective.seeded_output, inputs.pieces(group), A, *seeds))
    return mixer.output(take(torch.cat(pieces, dim=1).flatten(1, 3), chunks.block_place), z, dtype)


def _laid(
    mixer: SelectiveMixer, convolved: Tensor, context: Tensor | None, rows: RowReach, token: Tensor, filled: Tensor
) -> SelectiveInputs:
    """The scan's inputs, laid out in chunks: the convolution, seeded with the context tower's rows, then what `core`
    makes of it; nothing in places that hold no token (`filled` False)."""
    inputs = mixer.core.scan_inputs(seeded_conv(convolved, context, rows, *mixer.kernel))
    return SelectiveInputs(*(take(part, token) for part in inputs)).masked(filled)


def _reach(chunks: Chunks, num_rows: int) -> Reach:
    return Reach(*(part.expand(num_rows, -1, -1) for part in Reach.of(chunks)))


def _groups(shape: torch.Size, A: Tensor) -> Iterator[slice]:
    """Slices of c chunks for the context tower's inputs of a shape (b, c, q, m)."""
    b, c, q, _ = shape
    step = max(GROUP // (b * q * A.numel()), 1)
    return (slice(start, start + step) for start in range(0, c, step))


def _recomputed(function: Callable[..., T], *arguments: object) -> T:
    """A state after every token is too much to keep."""
    return maybe_recomputed(torch.is_grad_enabled(), function, *arguments)
