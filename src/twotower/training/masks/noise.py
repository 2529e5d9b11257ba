"""Masking training rows: absorbing noise with a level t̂ per block (BD3-LM, arXiv 2503.09573).

Letters: b batch, v views (noisy versions of one row), t tokens, n blocks of a row, s places of a block.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.errors import SettingError
from twotower.training.config import Grid, LevelPer
from twotower.training.forward.layout import Layout, answer_offsets, make_layout

MIN_LEVEL = 1e-3
# 2^64 over the golden ratio: its multiples modulo 2^64 are spread evenly, however many are taken.
_GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """How blocks are masked.

    `level_per` draws the noise level t̂, the probability of being masked, once per block (lower variance) or once per
    row ("example"). `full_mask_fraction` of the blocks (or rows) get t̂ = 1, the state in which decoding starts every
    block. `later_weight` β masks later positions i of a block more often, in proportion to exp(β(1−t̂)i).
    `complementary` adds a second view of each row, at level 1−t̂, in which the other scored positions are masked; both
    views share one pass of the context tower. With `grid` "answers" a block begins at the first scored token of each
    document, as in decoding; with "anywhere" the grid of each row starts at a random offset.
    """

    level_per: LevelPer = "block"
    full_mask_fraction: float = 0.0
    later_weight: float = 0.0
    complementary: bool = False
    grid: Grid = "anywhere"

    def __post_init__(self) -> None:
        if self.level_per not in ("block", "example"):
            raise SettingError("level_per", self.level_per, "block or example")
        if self.grid not in ("anywhere", "answers"):
            raise SettingError("grid", self.grid, "anywhere or answers")
        if not 0 <= self.full_mask_fraction <= 1:
            raise SettingError("full_mask_fraction", self.full_mask_fraction, "in [0, 1]")
        if not 0 <= self.later_weight < float("inf"):
            raise SettingError("later_weight", self.later_weight, "0 or more", "0 masks all positions alike")


class Corrupted(NamedTuple):
    """Rows with some tokens masked: xt (v·b, t), which of them are `masked` (v·b, t) bool, each position's t̂ `level`
    (v·b, t), the t̂ that the model is `told` (v·b, t), the positions that may be masked, `scored` (b, t) bool, and
    where the blocks lie."""

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
        """The rows in `part` with all their views: a micro-batch."""
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
    """Masks each scored position of x0 (b, t) int64 with probability t̂, the noise level of its block.

    t̂ is uniform on [1e-3, 1], by low-discrepancy draws (as in MDLM, arXiv 2406.07524): a row's n blocks get one t̂ in
    each of n equal strata, and the place inside the strata is spread evenly over consecutive samples. The grid of
    blocks starts where `noise.grid` says, so a document's first and last block may be shorter.

    A row's noise depends on (seed, its number in `samples` (b,)) alone, not on the batch or rank that it is in.
    Positions where `scored` (b, t) bool is False, such as prompts and padding, are never masked, nor are tokens that
    are mask tokens already, which would have no target. `document` (b, t) int64 numbers the documents of a row,
    non-decreasing; None means one document per row.
    """
    b, t = x0.shape
    scored = scored & (x0 != mask_token_id)
    document = torch.zeros(b, t, dtype=torch.int64) if document is None else document
    generators = [generator_of(seed, sample) for sample in samples.tolist()]
    offsets = torch.tensor([int(torch.randint(block_size, (1,), generator=g)) for g in generators])
    if noise.grid == "answers":
        offsets = answer_offsets(document, scored, block_size)
    layout = make_layout(document, block_size, offsets)
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
    coins = torch.stack(
        [(torch.rand(t, generator=g) < 0.5)[block] for g, block in zip(generators, layout.block, strict=True)]
    )
    views = level.shape[0] // b
    told = rounded_for_some(level, coins.repeat(views, 1))
    return Corrupted(x0.repeat(views, 1).masked_fill(masked, mask_token_id), masked, level, told, scored, layout)


def rounded_for_some(level: Tensor, chosen: Tensor) -> Tensor:
    """The levels that the model is told, rounded as a bf16 model rounds them where `chosen`.

    A bf16 model multiplies t̂ by 1000 in bf16 (812.5 becomes 812). The time embedding's fast sinusoids differ between
    the two, so half of the blocks are told the rounded level, and the denoiser works in either dtype.
    """
    return torch.where(chosen, (level.bfloat16() * 1000).float() / 1000, level)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers alone, such as a run's seed and a row's number."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _level(sample: int, seed: int, n: int, noise: Noise, generator: torch.Generator) -> Tensor:
    """(n,): t̂ of each of a sample's n blocks."""
    (start,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    place = (int(start) + sample * _GOLDEN) % 2**64 / 2**64
    strata = torch.randperm(n, generator=generator) if noise.level_per == "block" else torch.zeros(n)
    width = n if noise.level_per == "block" else 1
    level = MIN_LEVEL + (1 - MIN_LEVEL) * (strata + place) / width
    coins = torch.rand(n, generator=generator)
    full = (coins if noise.level_per == "block" else coins[:1]) < noise.full_mask_fraction
    return level.float().masked_fill(full, 1.0)


def _mask_probability(level: Tensor, layout: Layout, later_weight: float) -> Tensor:
    """(b, t): each position's probability, proportional to exp(β(1−t̂)i) for the i-th position of its block.

    The mean over a block is its t̂. Where proportionality asks for more than 1, the position gets 1 and the excess is
    shared among the others in proportion, until none exceeds 1.
    """
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
