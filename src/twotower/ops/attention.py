"""Attention over cached keys. Letters: b batch, h heads, k KV heads, s queries, t cached keys, p head width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (b, s, heads, p), halves paired as in Hugging Face's Llama; cos, sin (b or 1, s, 1, p/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def cached_attention(q: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Queries (b, h, s, p) over keys and values (b, k, t, p); bias (b or 1, 1, s or 1, t) is added to the scores.

    Returns (b, h, s, p). Scale p^-0.5; grouped queries without repeating the keys.
    """
    return F.scaled_dot_product_attention(q, key, value, attn_mask=bias, enable_gqa=q.shape[1] != key.shape[1])


def seeded_attention(
    q: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, bias: Tensor | None
) -> Tensor:
    """A block's queries over [past keys | the block's own keys], one softmax, no copy of the past.

    q (b, h, s, p); key, value (b, k, s, p); past (b, k, t, p), t may be 0; bias (b or 1, 1, 1, t+s) is -inf at unused
    places. Returns (b, h, s, p).
    """
    b, h, s, p = q.shape
    k = key.shape[1]
    t = past_key.shape[2]
    rows = (q * p**-0.5).reshape(b, k, h // k * s, p)  # grouped queries: heads of one KV head side by side
    scores = rows @ key.transpose(-1, -2)  # (b, k, h/k·s, s)
    if t:
        scores = torch.cat((rows @ past_key.transpose(-1, -2), scores), dim=-1)  # (b, k, h/k·s, t+s)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1)
    attended = weights[..., t:] @ value
    if t:
        attended = attended + weights[..., :t] @ past_value
    return attended.view(b, h, s, p)
