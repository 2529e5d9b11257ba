"""Rotary positions. Letters: b rows, s tokens, p head width, n turned numbers of a head (n ≤ p)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.transfer import to_device
from twotower.rope import AttentionType, Rope


class Rotation(NamedTuple):
    """RoPE's cosines and sines for s tokens, (b or 1, s, 1, n/2)."""

    cos: Tensor
    sin: Tensor


class Positioning(NamedTuple):
    """What the positions of s tokens do in a layer of attention: RoPE turns queries and keys, and `query_scale`
    (b or 1, s, 1, 1) multiplies queries; None where the layer has no such thing."""

    rope: Rotation | None
    query_scale: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Positioning":
        """With every tensor changed."""
        rope = None if self.rope is None else Rotation(change(self.rope.cos), change(self.rope.sin))
        return Positioning(rope, None if self.query_scale is None else change(self.query_scale))


def query_scale(positions: Tensor, kind: AttentionType, dtype: torch.dtype) -> Tensor:
    """What multiplies queries at positions (b, s) int64, see `AttentionType`: (b, s, 1, 1)."""
    periods = (positions + kind.query_offset) // kind.query_period
    return (1 + kind.query_growth * periods.float().log1p()).to(dtype)[..., None, None]


def rotation(positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype) -> Rotation:
    """Angles position · frequency for positions (b, s) and frequencies (n/2,) or (b, s or 1, 1, n/2), computed in
    float32 as Hugging Face does; cosines and sines are multiplied by `factor`."""
    angles = positions[..., None, None].float() * to_device(frequencies, positions.device)  # (b, s, 1, n/2)
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return Rotation(cos.to(dtype), sin.to(dtype))


def rotate(x: Tensor, rope: Rotation) -> Tensor:
    """RoPE on x (b, s, heads, p), halves paired as in Hugging Face's Llama: number j of the first n turns with number
    j + n/2, and those behind n stay."""
    turned = 2 * rope.cos.shape[-1]
    first, second = x[..., :turned].chunk(2, dim=-1)
    parts = (first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin)
    return torch.cat(parts if turned == x.shape[-1] else (*parts, x[..., turned:]), dim=-1)


def frequencies(rope: Rope, head_dim: int, length: int) -> Tensor:
    """The frequencies (n/2,) float32 for texts of `length` tokens; f_j = theta^(-2j/n) before scaling.

    "linear" divides all by the factor; "llama3" only the slow ones and "yarn" (arXiv 2309.00071) the slow ones, with a
    ramp between; "longrope" (arXiv 2402.13753) each by its own, `short_factor` for texts up to the original length and
    `long_factor` for longer ones; "dynamic" raises theta for texts longer than the original length.
    """
    n = rope.part(head_dim)
    exponents = torch.arange(0, n, 2, dtype=torch.float32) / n
    theta, factor, original = rope.rope_theta, rope.factor, rope.original_max_position_embeddings
    if rope.rope_type == "dynamic" and length > original:
        theta = theta * (factor * length / original - (factor - 1)) ** (n / (n - 2))
    if rope.rope_type == "longrope":
        divisors = torch.tensor(rope.long_factor if length > original else rope.short_factor)
        return 1.0 / (divisors * theta**exponents)
    found = 1.0 / theta**exponents
    if rope.rope_type == "linear":
        return found / factor
    if rope.rope_type == "llama3":
        return _llama3(found, rope)
    return _yarn(theta**exponents, rope, n) if rope.rope_type == "yarn" else found


def _llama3(found: Tensor, rope: Rope) -> Tensor:
    """Waves that fit into the original length fewer than low_freq_factor times become longer by the factor, those that
    fit more than high_freq_factor times stay."""
    fits = rope.original_max_position_embeddings / (2 * math.pi / found)
    smooth = (fits - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * found / rope.factor + smooth * found
    slow, fast = fits < rope.low_freq_factor, fits > rope.high_freq_factor
    return torch.where(slow, found / rope.factor, torch.where(fast, found, between))


def _yarn(periods: Tensor, rope: Rope, n: int) -> Tensor:
    """From number `low` of the frequencies on they are divided by a part of the factor, from `high` on by all of it;
    these turn beta_fast and beta_slow times within the original length."""

    def index(turns: float) -> float:
        length = rope.original_max_position_embeddings
        return n * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(len(periods), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept
