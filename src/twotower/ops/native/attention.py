"""Attention over cached keys, see `twotower.ops.attention`. Letters: b batch, h heads, k KV heads, s queries, t cached
keys, p head width.

A mask here is the counts themselves: int64 (2, b), each row's cached keys before the queries and its block's width.
"""

import torch
from torch import Tensor

from twotower.ops.native.call import function, threads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x if x.stride(-1) == 1 and x.stride(2) == x.shape[3] else x.contiguous()
    b, s, heads, p = x.shape
    out = x.new_empty(b, s, heads, p)
    call = function("tt_rotate", "pll ppl llll p")
    angles = (cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else cos.stride(0))
    call(x.data_ptr(), x.stride(0), x.stride(1), *angles, b, s, heads, p, out.data_ptr())
    return out


def causal_mask(starts: tuple[int, ...], s: int, t: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor((starts, (0,) * len(starts)))


def block_mask(
    starts: tuple[int, ...], widths: tuple[int, ...], s: int, t: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.tensor((starts, widths))


def cached_attention(q: Tensor, key: Tensor, value: Tensor, mask: Tensor, pages: Tensor | None = None) -> Tensor:
    return _attend(q, key, value, None, None, mask, pages)


def seeded_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor,
    pages: Tensor | None = None,
) -> Tensor:
    return _attend(q, past_key, past_value, key, value, mask, pages)


def _attend(
    q: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    mask: Tensor,
    pages: Tensor | None,
) -> Tensor:
    b, h, s, p = q.shape
    q = _heads_dense(q)
    assert past_key.stride() == past_value.stride()
    own: tuple[int | None, ...] = (None, 0, 0, None, 0, 0)
    if key is not None and value is not None:
        key, value = _heads_dense(key), _heads_dense(value)
        own = (key.data_ptr(), key.stride(0), key.stride(2), value.data_ptr(), value.stride(0), value.stride(2))
    out = q.new_empty(b, s, h, p)
    call = function("tt_attention", "pll pplll pll pllpll ppif lllll pi")
    call(
        *(q.data_ptr(), q.stride(0), q.stride(2)),
        *(past_key.data_ptr(), past_value.data_ptr(), *past_key.stride()[:3]),
        *(None if pages is None else pages.data_ptr(), 0 if pages is None else pages.shape[1], past_key.shape[2]),
        *own,
        *(mask[0].data_ptr(), mask[1].data_ptr(), key is None, p**-0.5),
        *(b, s, h, past_key.shape[1], p),
        *(out.data_ptr(), threads()),
    )
    return out.transpose(1, 2)


def _heads_dense(x: Tensor) -> Tensor:
    """(b, heads, s, p) whose heads lie side by side within a token."""
    if x.stride(3) == 1 and x.stride(1) == x.shape[3]:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)
