"""Recurrent layers over tokens that vLLM verifies, on CPUs, whose vLLM build forgets how many were kept.

Letters: b rows, t tokens of all rows, c channels, w width of the convolution, l places of a row's entry in the cache,
s tokens of the longest row, r rows that have a token of some number."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve_drafts_(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    slots: Tensor,
    num_accepted: Tensor,
    starts: Tensor,
) -> Tensor:
    """silu of the causal convolution of x (t, c), whose rows begin at starts (b + 1), with weight (c, w): (t, c).

    `state` (entries, c, l) has at the row's entry, slots (b,), what the last pass convolved, from its second place on;
    `num_accepted` (b,) of that pass's tokens were kept, so that the w − 1 places from the one of that number on stand
    before x. They are replaced by what this pass convolves. Entry 0 is of rows that don't count.
    """
    rows = _rows(slots, num_accepted, starts)
    width, most = weight.shape[1], int(rows.counts.max()) if len(rows.counts) else 0
    if not most:
        return torch.zeros_like(x)
    of = torch.repeat_interleave(torch.arange(len(rows.counts)), rows.counts)  # (t,)
    place = torch.arange(len(of)) - (rows.counts.cumsum(0) - rows.counts)[of]
    tokens = rows.starts[of] + place
    before = rows.num_accepted[:, None] - 1 + torch.arange(width - 1)
    entered = state.new_zeros((len(rows.counts), width - 1 + most, state.shape[1]))
    entered[:, : width - 1] = state[rows.slots[:, None], :, before]
    entered[of, width - 1 + place] = x[tokens].to(state.dtype)
    windows = entered[of[:, None], place[:, None] + torch.arange(width)]  # (t, w, c)
    # float32: vLLM's kernel adds up in it, too
    wide = torch.promote_types(x.dtype, torch.float32)
    mixed = (windows.to(wide) * weight.t().to(wide)).sum(1)
    out = torch.zeros_like(x)
    out[tokens] = F.silu(mixed if bias is None else mixed + bias.to(wide)).to(x.dtype)
    # What stands behind a shorter row's tokens is never read.
    state[rows.slots, :, : width - 2 + most] = entered[:, 1:].transpose(1, 2)
    return out


def without_drafts(num_accepted: Tensor, starts: Tensor) -> bool:
    """Whether every row has one token, and had one: then nothing depends on what was kept."""
    num_rows = len(num_accepted)
    return int(num_accepted.max()) <= 1 and torch.equal(starts, torch.arange(num_rows + 1, dtype=starts.dtype))


class Turns(NamedTuple):
    """The order in which a recurrence goes over the tokens of all rows: every row's first, then every row's second, …

    `tokens` (t,) are their places among all in this order, and each entry of `entries` is a turn: the entries of the
    state before (r,) and after (r,) its next r tokens, int32.
    """

    tokens: Tensor
    entries: list[tuple[Tensor, Tensor]]


def turns(slots: Tensor, num_accepted: Tensor, starts: Tensor) -> Turns:
    """The turns of rows whose tokens begin at starts (b + 1).

    `slots` (b, at least a row's tokens) are a row's entries: that of the token before it is the one of the last token
    that was kept of `num_accepted` (b,), and the state after each token goes to the entry of its number. Entry 0 is of
    rows that don't count.
    """
    rows = _rows(slots[:, 0], num_accepted, starts)
    # The longest first, so that the rows of a turn are the first ones
    counts, order = rows.counts.sort(descending=True)
    table = slots[rows.numbers[order]].int()
    before = table.gather(1, rows.num_accepted[order, None] - 1)[:, 0]
    counted = counts.tolist()
    entries: list[tuple[Tensor, Tensor]] = []
    columns = table.t().contiguous()
    sizes = [sum(n > number for n in counted) for number in range(max(counted, default=0))]
    for number, size in enumerate(sizes):
        after = columns[number, :size]
        entries.append((before[:size], after))
        before = after
    first = rows.starts[order].tolist()
    tokens = [first[row] + number for number, size in enumerate(sizes) for row in range(size)]
    return Turns(torch.tensor(tokens, dtype=torch.long), entries)


class _Rows(NamedTuple):
    """The rows (b,) that count and have tokens, by their numbers among all; everything int64."""

    numbers: Tensor
    slots: Tensor
    num_accepted: Tensor
    starts: Tensor
    counts: Tensor


def _rows(slots: Tensor, num_accepted: Tensor, starts: Tensor) -> _Rows:
    counts = starts.diff().long()
    numbers = ((slots != 0) & (counts > 0)).nonzero()[:, 0]
    kept = num_accepted[numbers].long().clamp(min=1)
    return _Rows(numbers, slots[numbers].long(), kept, starts[numbers].long(), counts[numbers])
