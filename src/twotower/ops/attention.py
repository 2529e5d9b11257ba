"""Attention over cached keys. Letters: b batch, h heads, k KV heads, s queries, t cached keys, p head width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.transfer import to_device


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (b, s, heads, p), halves paired as in Hugging Face's Llama; cos, sin (b or 1, s, 1, p/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_mask(starts: tuple[int, ...], s: int, t: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For `cached_attention` of s new tokens after `starts` (b) earlier ones: (b, 1, s, t), -inf at later keys."""
    last = to_device(starts, device)[:, None] + torch.arange(s, device=device)  # (b, s): newest key seen
    later = torch.arange(t, device=device) > last.unsqueeze(-1)  # (b, s, t)
    return torch.zeros(later.shape, dtype=dtype, device=device).masked_fill_(later, -torch.inf).unsqueeze(1)


def block_mask(
    starts: tuple[int, ...], widths: tuple[int, ...], s: int, t: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """For `seeded_attention`: (b, 1, 1, t+s), -inf at cache places from `starts` (b) on and at block places from
    `widths` (b) on; None if there are neither."""
    if all(n == t for n in starts) and all(n == s for n in widths):
        return None
    past = torch.arange(t, device=device) >= to_device(starts, device)[:, None]
    own = torch.arange(s, device=device) >= to_device(widths, device)[:, None]
    hidden = torch.cat((past, own), dim=1)[:, None, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def cached_attention(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pages: Tensor | None = None) -> Tensor:
    """Queries (b, h, s, p) over keys and values (b, k, t, p); mask (b or 1, 1, s or 1, t) is added to the scores.

    Returns (b, h, s, p). Scale p^-0.5; grouped queries without repeating the keys. With `pages` (b, m), keys and values
    are (n, k, size, p), of which row b reads entries pages[b] one after the other.
    """
    if pages is not None:
        key, value = gather_pages(key, pages), gather_pages(value, pages)
    return F.scaled_dot_product_attention(q, key, value, attn_mask=mask, enable_gqa=q.shape[1] != key.shape[1])


def seeded_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None,
    pages: Tensor | None = None,
) -> Tensor:
    """A block's queries over [past keys | the block's own keys] with one softmax; the past is not copied.

    q (b, h, s, p); key, value (b, k, s, p); past (b, k, t, p), t may be 0, or in `pages` as in `cached_attention`; mask
    from `block_mask`. Returns (b, h, s, p).
    """
    if pages is not None:
        past_key, past_value = gather_pages(past_key, pages), gather_pages(past_value, pages)
    b, h, s, p = q.shape
    k = key.shape[1]
    t = past_key.shape[2]
    rows = (q * p**-0.5).reshape(b, k, h // k * s, p)  # grouped queries: heads of one KV head side by side
    scores = rows @ key.transpose(-1, -2)  # (b, k, h/k·s, s)
    if t:
        scores = torch.cat((rows @ past_key.transpose(-1, -2), scores), dim=-1)  # (b, k, h/k·s, t+s)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    attended = weights[..., t:] @ value
    if t:
        attended = attended + weights[..., :t] @ past_value
    return attended.view(b, h, s, p)


def gather_pages(pool: Tensor, pages: Tensor) -> Tensor:
    """Copies the pages (b, m) of pool (n, k, size, p) to (b, k, m·size, p)."""
    return pool[pages].transpose(1, 2).flatten(2, 3)
