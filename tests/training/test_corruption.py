from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.training.corruption import MIN_LEVEL, Corrupted, corrupt

MASK = 3


def run(x0: Tensor, scored: Tensor | None = None, *, seed: int = 0, **changed: Any) -> Corrupted:
    settings = {"block_size": 8, "mask_token_id": MASK, "full_mask_fraction": 0.0} | changed
    scored = torch.ones_like(x0, dtype=torch.bool) if scored is None else scored
    return corrupt(x0, scored, generator=torch.Generator().manual_seed(seed), **settings)


def tokens(b: int, t: int) -> Tensor:
    return torch.arange(b * t).view(b, t) % 30 + 4


def test_masked_positions_hold_the_mask_and_the_others_their_token() -> None:
    x0 = tokens(5, 37)
    noisy = run(x0)
    assert bool((noisy.xt[noisy.masked] == MASK).all())
    assert torch.equal(noisy.xt[~noisy.masked], x0[~noisy.masked])
    assert noisy.masked.any()
    assert not noisy.masked.all()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("length", [1, 7, 8, 37])
def test_the_grid_starts_anywhere_and_levels_are_constant_within_a_block(seed: int, length: int) -> None:
    noisy = run(tokens(3, length), seed=seed)
    sizes = noisy.block.bincount().tolist()
    assert noisy.block.tolist() == sorted(noisy.block.tolist())
    assert all(size == 8 for size in sizes[1:-1])
    assert all(size <= 8 for size in sizes)
    for index in noisy.block.unique():
        own = noisy.level[:, noisy.block == index]
        assert bool((own == own[:, :1]).all())


def test_every_offset_of_the_grid_comes_up() -> None:
    firsts = [run(tokens(1, 37), seed=seed).block.bincount()[0].item() for seed in range(200)]
    assert set(firsts) == set(range(1, 9))


def test_the_mask_rate_is_the_level() -> None:
    rates: dict[int, list[float]] = {tenth: [] for tenth in range(10)}
    for seed in range(20):
        noisy = run(tokens(8, 512), seed=seed, block_size=64)
        for row in range(8):
            for index in noisy.block.unique():
                place = noisy.block == index
                if place.sum() < 32:
                    continue
                level = noisy.level[row, place][0].item()
                rates[min(int(level * 10), 9)].append(noisy.masked[row, place].float().mean().item() - level)
    for differences in rates.values():
        assert len(differences) > 50
        assert abs(sum(differences) / len(differences)) < 0.02  # 4 standard deviations of about 0.06/sqrt(50…)


def test_levels_are_one_per_stratum() -> None:
    """Low discrepancy: sorted, the n-th of N levels lies in the n-th of N equal parts of [1e-3, 1]."""
    for seed in range(5):
        noisy = run(tokens(4, 40), seed=seed)
        n = 4 * (int(noisy.block[-1]) + 1)
        levels = torch.stack([noisy.level[:, noisy.block == i][:, 0] for i in noisy.block.unique()]).flatten()
        strata = (levels - MIN_LEVEL) / (1 - MIN_LEVEL) * n
        # half of the blocks see their level as a bf16 model does, off by up to 2^-8 of it twice
        slack = levels.sort().values * n * 2**-7 + 1e-3
        order = torch.arange(n)
        assert bool((strata.sort().values >= order - slack).all())
        assert bool((strata.sort().values <= order + 1 + slack).all())
        assert levels.unique().numel() == n


def test_levels_come_as_float32_and_as_bf16_models_see_them() -> None:
    noisy = run(tokens(32, 128))
    scaled = noisy.level[:, ::8].flatten() * 1000
    as_bf16 = (scaled - scaled.bfloat16().float()).abs() < 1e-3
    assert 0.35 < as_bf16.float().mean() < 0.65


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_fraction_of_blocks_is_fully_masked(fraction: float) -> None:
    full = total = 0
    for seed in range(20):
        noisy = run(tokens(8, 256), seed=seed, full_mask_fraction=fraction)
        for index in noisy.block.unique():
            place = noisy.block == index
            chosen = noisy.level[:, place][:, 0] == 1.0
            full, total = full + int(chosen.sum()), total + 8
            assert bool(noisy.masked[chosen][:, place].all())
    assert abs(full / total - fraction) < 0.03  # 4 standard deviations of 0.006


def test_what_is_not_scored_is_never_masked() -> None:
    scored = torch.arange(37) >= torch.tensor([0, 5, 36, 37])[:, None]
    for seed in range(10):
        noisy = run(tokens(4, 37), scored, seed=seed, full_mask_fraction=1.0)
        assert torch.equal(noisy.masked, scored)


def test_noise_depends_on_the_generator_alone() -> None:
    first, again, other = run(tokens(4, 37), seed=1), run(tokens(4, 37), seed=1), run(tokens(4, 37), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.masked, other.masked)
