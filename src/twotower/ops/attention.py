"""Attention over cached keys. Letters: b batch, h heads, k KV heads, s queries, t cached keys, p head width."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.transfer import to_device


class ScoreRule(NamedTuple):
    """How products of queries and keys become weights: multiplied by `scale`, limited to cap·tanh(score / cap) where
    there is a `softcap`, and put through a softmax that `sinks` (h,) join as one more score per head, without a value.
    With `slopes`, one per head, slope·|i − j| is subtracted from the score of a query at position i for a key at j
    (ALiBi, arXiv 2108.12409); masks have that in them.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: tuple[float, ...] = ()


def causal_mask(
    starts: tuple[int, ...],
    s: int,
    t: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    window: int | None = None,
    chunk: int | None = None,
    slopes: tuple[float, ...] = (),
) -> Tensor:
    """For `cached_attention` of s new tokens after `starts` (b) earlier ones: (b, 1, s, t), -inf at keys that a token
    does not see: later ones, those at `window` or more places before it, those before its chunk of positions. With
    `slopes` (b, h, s, t), at other keys what ALiBi adds."""
    place = (to_device(starts, device)[:, None] + torch.arange(s, device=device)).unsqueeze(-1)  # (b, s, 1)
    key = torch.arange(t, device=device)
    hidden = (key > place) | _out_of_reach(place, key, window, chunk)  # (b, s, t)
    return masked(hidden.unsqueeze(1), place - key, dtype, slopes)


def block_mask(
    starts: tuple[int, ...],
    widths: tuple[int, ...],
    s: int,
    t: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    window: int | None = None,
    chunk: int | None = None,
    slopes: tuple[float, ...] = (),
) -> Tensor | None:
    """For `seeded_attention`: (b, 1, 1 or s, t+s), -inf at cache places from `starts` (b) on, at block places from
    `widths` (b) on, and at what is out of reach by `window` or `chunk` on either side; None if nothing is hidden. With
    `slopes` (b, h, s, t+s), at other places what ALiBi adds."""
    one_rule = window is None and chunk is None and not slopes
    if one_rule and all(n == t for n in starts) and all(n == s for n in widths):
        return None
    first, width = to_device(starts, device)[:, None], to_device(widths, device)[:, None]
    past, own = torch.arange(t, device=device), torch.arange(s, device=device)
    hidden = torch.cat((past >= first, own >= width), dim=1).unsqueeze(1)  # (b, 1, t+s)
    place = (first + own).unsqueeze(-1)  # (b, s, 1)
    key = torch.cat((past.expand(len(starts), t), first + own), dim=1).unsqueeze(1)  # (b, 1, t+s)
    if window is not None or chunk is not None:
        # Padding reaches everything: a softmax over nothing would be NaN, and 0 times its value would spread that.
        hidden = hidden | (_out_of_reach(place, key, window, chunk) & (own < width).unsqueeze(-1))
    return masked(hidden.unsqueeze(1), place - key, dtype, slopes)


def masked(hidden: Tensor, distance: Tensor, dtype: torch.dtype, slopes: tuple[float, ...]) -> Tensor:
    """What is added to scores: -inf where `hidden` (b, 1, 1 or s, t) is true, elsewhere 0 (b, 1, 1 or s, t), or with
    `slopes` -slope·|distance| of each head for distances (b, s, t) or (s, t): (b, h, s, t)."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    if not slopes:
        return mask
    slope = torch.tensor(slopes, dtype=dtype, device=hidden.device).view(-1, 1, 1)
    return mask - slope * distance.abs().unsqueeze(-3)


def _out_of_reach(place: Tensor, key: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """Whether keys at positions `key` are `window` or more places from `place`, or in another chunk of positions."""
    hidden = torch.zeros((), dtype=torch.bool, device=place.device)
    if window is not None:
        hidden = hidden | ((place - key).abs() >= window)
    return hidden if chunk is None else hidden | (place // chunk != key // chunk)


def cached_attention(
    q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: ScoreRule, pages: Tensor | None = None
) -> Tensor:
    """Queries (b, h, s, p) over keys and values (b, k, t, p); mask (b or 1, 1 or h, s or 1, t) is added to the scores.

    Returns (b, h, s, p). Grouped queries without repeating the keys. With `pages` (b, m), keys and values are
    (n, k, size, p), of which row b reads entries pages[b] one after the other.
    """
    if pages is not None:
        key, value = gather_pages(key, pages), gather_pages(value, pages)
    if rule.softcap is None and rule.sinks is None:
        gqa = q.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=rule.scale, enable_gqa=gqa)
    b, h, s, p = q.shape
    rows = _by_kv_head(q * rule.scale, key.shape[1])
    weights = _weights(rows @ key.transpose(-1, -2), mask, rule, h)
    return (weights @ value).view(b, h, s, p)


def seeded_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None,
    rule: ScoreRule,
    pages: Tensor | None = None,
) -> Tensor:
    """A block's queries over [past keys | the block's own keys] with one softmax; the past is not copied.

    q (b, h, s, p); key, value (b, k, s, p); past (b, k, t, p), t may be 0, or in `pages` as in `cached_attention`; mask
    from `block_mask`. Returns (b, h, s, p).
    """
    if pages is not None:
        past_key, past_value = gather_pages(past_key, pages), gather_pages(past_value, pages)
    b, h, s, p = q.shape
    t = past_key.shape[2]
    rows = _by_kv_head(q * rule.scale, key.shape[1])
    scores = rows @ key.transpose(-1, -2)  # (b, k, h/k·s, s)
    if t:
        scores = torch.cat((rows @ past_key.transpose(-1, -2), scores), dim=-1)  # (b, k, h/k·s, t+s)
    weights = _weights(scores, mask, rule, h)
    attended = weights[..., t:] @ value
    if t:
        attended = attended + weights[..., :t] @ past_value
    return attended.view(b, h, s, p)


def _by_kv_head(q: Tensor, num_kv: int) -> Tensor:
    """Queries (b, h, s, p) with the heads of one KV head side by side: (b, k, h/k·s, p)."""
    b, h, s, p = q.shape
    return q.reshape(b, num_kv, h // num_kv * s, p)


def _weights(scores: Tensor, mask: Tensor | None, rule: ScoreRule, num_heads: int) -> Tensor:
    """The softmax of scores (b, k, h/k·s, t), capped, masked and with sinks as the rule says."""
    b, k, rows, t = scores.shape
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        by_group = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (k, -1))
        scores = (scores.view(b, k, num_heads // k, -1, t) + by_group).view(b, k, rows, t)
    if rule.sinks is None:
        return scores.softmax(-1)
    sinks = rule.sinks.view(1, k, -1, 1).expand(b, -1, -1, rows * k // num_heads).reshape(b, k, rows, 1)
    return torch.cat((scores, sinks.to(scores.dtype)), dim=-1).softmax(-1)[..., :-1]


def gather_pages(pool: Tensor, pages: Tensor) -> Tensor:
    """Copies the pages (b, m) of pool (n, k, size, p) to (b, k, m·size, p)."""
    return pool[pages].transpose(1, 2).flatten(2, 3)
