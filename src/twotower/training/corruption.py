"""Absorbing noise on blocks. Letters: b batch, v views (noisy versions of one row), t tokens, n blocks of a row."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.training.forward.layout import Layout, make_layout

LevelPer = Literal["block", "example"]

MIN_LEVEL = 1e-3
# 2^64 over the golden ratio: multiples of it, modulo 2^64, are spread evenly however many there are
_GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """How blocks are masked.

    `level_per` draws t̂ once per block (lower variance) or once per row. `full_mask_fraction` of the blocks (or rows)
    get t̂ = 1, the state that every block is decoded from first. `later_weight` β masks later positions of a block more
    often, with weight exp(β(1−t̂)i). `complementary` adds a second view of each row with the other scored positions
    masked, at level 1−t̂; both share one context pass.
    """

    level_per: LevelPer = "block"
    full_mask_fraction: float = 0.0
    later_weight: float = 0.0
    complementary: bool = False

    def __post_init__(self) -> None:
        if self.level_per not in ("block", "example"):
            raise ValueError(f"level_per is {self.level_per!r}, must be block or example")
        if not 0 <= self.full_mask_fraction <= 1:
            raise ValueError(f"full_mask_fraction is {self.full_mask_fraction}, must be in [0, 1]")
        if not 0 <= self.later_weight < float("inf"):
            raise ValueError(f"later_weight is {self.later_weight}, must be 0 or more; 0 masks all positions alike")


class Corrupted(NamedTuple):
    """xt (v·b, t) with masks, `masked` (v·b, t) bool, `level` (v·b, t) each position's t̂ and `told` (v·b, t) the t̂ that
    the model is given; `scored` (b, t) bool the positions that could be masked, and where the blocks lie."""

    xt: Tensor
    masked: Tensor
    level: Tensor
    told: Tensor
    scored: Tensor
    layout: Layout

    def to(self, device: torch.device) -> "Corrupted":
        """The same on another device."""
        layout = Layout(self.layout.block.to(device), self.layout.document.to(device))
        xt, masked, level, told, scored = (v.to(device) for v in self[:5])
        return Corrupted(xt, masked, level, told, scored, layout)

    def rows(self, part: slice) -> "Corrupted":
        """The given rows, with all their views: a micro-batch."""
        b = self.scored.shape[0]
        xt, masked, level, told = (
            v.unflatten(0, (-1, b))[:, part].flatten(0, 1) for v in (self.xt, self.masked, self.level, self.told)
        )
        layout = Layout(self.layout.block[part], self.layout.document[part])
        return Corrupted(xt, masked, level, told, self.scored[part], layout)


def corrupt(
    x0: Tensor,
    scored: Tensor,
    samples: Tensor,
    *,
    seed: int,
    noise: Noise,
    block_size: int,
    mask_token_id: int,
    document: Tensor | None = None,
) -> Corrupted:
    """Masks each scored position of x0 (b, t) with its block's own probability t̂ (linear schedule).

    The noise of a row depends on (seed, its index in `samples` (b,)) alone, not on the batch or rank that it is in.
    t̂ ~ U[1e-3, 1] by low-discrepancy draws: a row's n blocks get one t̂ in each of n equal strata, at a place inside
    them that is spread evenly over consecutive samples. The block grid starts at a random offset, so a document's first
    and last block may be short. Positions outside `scored` (b, t) bool, such as prompts and padding, are never masked.
    `document` (b, t) int64 numbers the documents packed into a row; without it a row is one.
    """
    b, t = x0.shape
    document = torch.zeros(b, t, dtype=torch.int64) if document is None else document
    generators = [_generator(seed, sample) for sample in samples.tolist()]
    offsets = [int(torch.randint(block_size, (1,), generator=g)) for g in generators]
    layout = make_layout(document, block_size, torch.tensor(offsets))
    drawn = [
        _level(sample, seed, int(block[-1]) + 1, noise, g)[block]
        for sample, block, g in zip(samples.tolist(), layout.block, generators, strict=True)
    ]
    level = torch.stack(drawn)  # (b, t)
    uniform = torch.stack([torch.rand(t, generator=g) for g in generators])
    masked = (uniform < _mask_probability(level, layout, noise.later_weight)) & scored
    if noise.complementary:
        masked = torch.cat((masked, scored & ~masked))
        level = torch.cat((level, (1 - level).clamp(min=MIN_LEVEL)))
    # A bf16 model multiplies t̂ by 1000 in bf16 (812.5 becomes 812); the fast sinusoids tell the two apart, so a
    # denoiser that is to work in either dtype sees both.
    coins = torch.stack(
        [(torch.rand(t, generator=g) < 0.5)[block] for g, block in zip(generators, layout.block, strict=True)]
    )
    views = level.shape[0] // b
    told = torch.where(coins.repeat(views, 1), (level.bfloat16() * 1000).float() / 1000, level)
    return Corrupted(x0.repeat(views, 1).masked_fill(masked, mask_token_id), masked, level, told, scored, layout)


def _generator(seed: int, sample: int) -> torch.Generator:
    (state,) = np.random.SeedSequence((seed, sample)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _level(sample: int, seed: int, n: int, noise: Noise, generator: torch.Generator) -> Tensor:
    """(n,) t̂ of a sample's blocks."""
    (start,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    place = (int(start) + sample * _GOLDEN) % 2**64 / 2**64
    strata = torch.randperm(n, generator=generator) if noise.level_per == "block" else torch.zeros(n)
    width = n if noise.level_per == "block" else 1
    level = MIN_LEVEL + (1 - MIN_LEVEL) * (strata + place) / width
    coins = torch.rand(n, generator=generator)
    full = (coins if noise.level_per == "block" else coins[:1]) < noise.full_mask_fraction
    return level.float().masked_fill(full, 1.0)


def _mask_probability(level: Tensor, layout: Layout, later_weight: float) -> Tensor:
    """(b, t): t̂ · exp(β(1−t̂)i) over its mean in the block, i the position in it; what would exceed 1 goes to the
    positions below, so that t̂ stays the expected masked fraction."""
    if later_weight == 0:
        return level
    place = torch.arange(level.shape[1]) - layout.block_start  # (b, t)
    size = layout.block_end - layout.block_start
    wide = int(size.max())
    index = (layout.block * wide + place).flatten(1)
    shape = (level.shape[0], (int(layout.block.max()) + 1) * wide)
    weight = level.new_zeros(shape).double().scatter(1, index, (later_weight * (1 - level.double()) * place).exp())
    wanted = level.new_zeros(shape).double().scatter(1, index, (level * size).double())
    weight, wanted = (
        weight.unflatten(1, (-1, wide)),
        wanted.unflatten(1, (-1, wide)).amax(-1, keepdim=True),
    )  # (b, n, s)
    full = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(wide):
        left = wanted - full.sum(-1, keepdim=True)
        rest = weight.masked_fill(full, 0.0)
        probability = (rest * left / rest.sum(-1, keepdim=True).clamp(min=1e-300)).masked_fill(full, 1.0)
        over = probability > 1
        if not bool(over.any()):
            break
        full |= over
    return probability.flatten(1).gather(1, index).to(level.dtype)
