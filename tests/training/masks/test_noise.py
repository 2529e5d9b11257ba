from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.training.masks.noise import MIN_LEVEL, Corrupted, Noise, corrupt

MASK = 3


def run(x0: Tensor, scored: Tensor | None = None, *, first: int = 0, **changed: Any) -> Corrupted:
    fields = {"level_per", "full_mask_fraction", "later_weight", "complementary", "grid"}
    noise = Noise(**{name: changed.pop(name) for name in fields & changed.keys()})
    settings: dict[str, Any] = {"block_size": 8, "mask_token_id": MASK, "seed": 0} | changed
    scored = torch.ones_like(x0, dtype=torch.bool) if scored is None else scored
    return corrupt(x0, scored, torch.arange(first, first + len(x0)), noise=noise, **settings)


def tokens(b: int, t: int) -> Tensor:
    return torch.arange(b * t).view(b, t) % 30 + 4


def block_levels(noisy: Corrupted, row: int) -> Tensor:
    block = noisy.layout.block[row % len(noisy.layout.block)]
    return torch.stack([noisy.level[row, block == i][0] for i in block.unique()])


def test_masked_positions_hold_the_mask_and_the_others_their_token() -> None:
    x0 = tokens(5, 37)
    noisy = run(x0)
    assert bool((noisy.xt[noisy.masked] == MASK).all())
    assert torch.equal(noisy.xt[~noisy.masked], x0[~noisy.masked])
    assert noisy.masked.any()
    assert not noisy.masked.all()


@pytest.mark.parametrize("length", [1, 7, 8, 37])
def test_the_grid_starts_anywhere_and_levels_are_constant_within_a_block(length: int) -> None:
    noisy = run(tokens(30, length))
    for row in range(30):
        sizes = noisy.layout.block[row].bincount().tolist()
        assert all(size == 8 for size in sizes[1:-1])
        assert all(size <= 8 for size in sizes)
        for index in noisy.layout.block[row].unique():
            place = noisy.layout.block[row] == index
            assert noisy.level[row, place].unique().numel() == noisy.told[row, place].unique().numel() == 1


def test_every_offset_of_the_grid_comes_up() -> None:
    assert set(run(tokens(200, 37)).layout.block_end[:, 0].tolist()) == set(range(1, 9))


def test_a_block_begins_at_each_answer_if_the_grid_is_of_answers() -> None:
    document = torch.tensor([[0] * 20 + [1] * 30])
    scored = torch.zeros_like(document, dtype=torch.bool)
    scored[0, 5:20] = scored[0, 31:] = True
    for first in range(9):
        layout = run(tokens(1, 50), scored, first=first, document=document, grid="answers").layout
        assert layout.block_start[0, [5, 19, 31, 49]].tolist() == [5, 13, 31, 47]


@pytest.mark.parametrize("level_per", ["block", "example"])
def test_the_mask_rate_is_the_level(level_per: str) -> None:
    noisy = run(tokens(400, 512), level_per=level_per)
    for tenth in range(10):
        place = (noisy.level >= tenth / 10) & (noisy.level < (tenth + 1) / 10)
        rate, level = noisy.masked[place].float().mean(), noisy.level[place].mean()
        assert abs(rate - level) < 4 * 0.5 / place.sum() ** 0.5  # 4 standard deviations at most


def test_a_rows_levels_are_one_per_stratum() -> None:
    noisy = run(tokens(6, 61))
    for row in range(6):
        levels = block_levels(noisy, row)
        strata = (levels.sort().values - MIN_LEVEL) / (1 - MIN_LEVEL) * len(levels)
        assert strata.floor().tolist() == list(range(len(levels)))
        assert (strata % 1 - strata[0] % 1).abs().max() < 1e-4  # float32 levels


def test_one_level_per_example_is_spread_evenly_over_any_run_of_samples() -> None:
    for first in (0, 777):
        levels = run(tokens(34, 20), first=first, level_per="example").level
        assert bool((levels == levels[:, :1]).all())
        gaps = torch.cat((torch.tensor([MIN_LEVEL]), levels[:, 0].sort().values, torch.tensor([1.0]))).diff()
        assert gaps.max() < 2 / 34  # independent draws leave gaps of 4/34


def test_the_model_is_told_levels_as_float32_and_as_bf16_models_see_them() -> None:
    noisy = run(tokens(64, 128))
    scaled = noisy.told[:, ::8].flatten() * 1000
    as_bf16 = (scaled - scaled.bfloat16().float()).abs() < 1e-3
    assert 0.35 < as_bf16.float().mean() < 0.65
    assert ((noisy.told - noisy.level).abs() <= noisy.level * 2**-7).all()  # rounded twice


@pytest.mark.parametrize("level_per", ["block", "example"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_fraction_is_fully_masked(fraction: float, level_per: str) -> None:
    noisy = run(tokens(400, 64), full_mask_fraction=fraction, level_per=level_per)
    full = noisy.level == 1.0
    assert bool(noisy.masked[full].all())
    assert abs(full.float().mean() - fraction) < 0.1  # 4 standard deviations of 400 draws
    if level_per == "example":
        assert bool((full == full[:, :1]).all())


@pytest.mark.parametrize("complementary", [True, False])
def test_what_is_not_scored_is_never_masked(complementary: bool) -> None:
    scored = torch.arange(37) >= torch.tensor([0, 5, 36, 37])[:, None]
    for first in range(0, 40, 4):
        noisy = run(tokens(4, 37), scored, first=first, full_mask_fraction=1.0, complementary=complementary)
        assert torch.equal(noisy.masked[:4], scored)
        assert not noisy.masked[4:].any()


def test_complementary_views_mask_every_scored_position_once_between_them() -> None:
    x0, scored = tokens(4, 37), torch.arange(37).expand(4, -1) >= 5
    noisy = run(x0, scored, complementary=True)
    single = run(x0, scored)
    assert torch.equal(noisy.masked[:4], single.masked)
    assert torch.equal(noisy.masked[:4] ^ noisy.masked[4:], scored)
    assert torch.equal(noisy.masked[:4] | noisy.masked[4:], scored)
    assert torch.equal(noisy.level[4:], (1 - noisy.level[:4]).clamp(min=MIN_LEVEL))
    assert torch.equal(noisy.xt[4:], x0.masked_fill(noisy.masked[4:], MASK))


@pytest.mark.slow
def test_later_positions_are_masked_more_often_at_the_same_rate() -> None:
    beta, x0 = 0.3, tokens(3000, 48)
    noisy = run(x0, later_weight=beta, level_per="example")
    even = (noisy.level[:, 0] > 0.25) & (noisy.level[:, 0] < 0.35)
    place = torch.arange(48) - noisy.layout.block_start
    whole = noisy.layout.block_end - noisy.layout.block_start == 8
    rates = torch.stack([noisy.masked[even][(place == i)[even] & whole[even]].float().mean() for i in range(8)])
    level = noisy.level[even].mean()
    assert abs(rates.mean() - level) < 0.02  # some 2000 draws a place
    expected = torch.exp(beta * (1 - level) * torch.arange(8.0))
    torch.testing.assert_close(rates, level * expected / expected.mean(), rtol=0.15, atol=0.02)
    # what exceeds 1 goes to the positions below
    sharp = run(x0, later_weight=3.0, level_per="example")
    high = (sharp.level[:, 0] > 0.5) & (sharp.level[:, 0] < 0.6)
    assert bool(sharp.masked[high][(place >= 6)[high] & whole[high]].float().mean() > 0.97)
    assert abs(sharp.masked[high][whole[high]].float().mean() - sharp.level[high].mean()) < 0.02
    full = run(x0, later_weight=3.0, full_mask_fraction=1.0)
    assert bool(full.masked.all())


def test_noise_of_a_sample_depends_on_the_seed_and_its_index_alone() -> None:
    x0 = tokens(1, 37).expand(6, -1)
    for options in ({}, {"later_weight": 0.2, "complementary": True}, {"level_per": "example"}):
        together = run(x0, first=10, **options)
        for row in range(6):
            alone = run(x0[:1], first=10 + row, **options)
            views = together.rows(slice(row, row + 1))
            assert all(torch.equal(a, b) for a, b in zip(alone[:5], views[:5], strict=True))
            assert torch.equal(alone.layout.block, views.layout.block)
    assert not torch.equal(together.masked[0], together.masked[1])
    assert not torch.equal(run(x0, seed=1).masked, run(x0, seed=2).masked)


def test_rows_keeps_every_view_of_a_row() -> None:
    noisy = run(tokens(4, 20), complementary=True)
    part = noisy.rows(slice(1, 3))
    assert torch.equal(part.xt, noisy.xt[[1, 2, 5, 6]])
    assert torch.equal(part.scored, noisy.scored[1:3])


def test_blocks_never_cross_packed_documents() -> None:
    document = torch.tensor([[0] * 10 + [1] * 3 + [2] * 24]).expand(20, -1)
    noisy = run(tokens(20, 37), document=document)
    for row in range(20):
        of_block = {(int(b), int(d)) for b, d in zip(noisy.layout.block[row], document[row], strict=True)}
        assert len(of_block) == noisy.layout.block[row].max() + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level_per": "token"}, "level_per is 'token', must be block or example"),
        ({"grid": "prompts"}, "grid is 'prompts', must be anywhere or answers"),
        ({"full_mask_fraction": 1.5}, r"full_mask_fraction is 1.5, must be in \[0, 1\]"),
        ({"later_weight": -1.0}, "later_weight is -1.0, must be 0 or more"),
        ({"later_weight": float("nan")}, "later_weight is nan, must be 0 or more"),
    ],
)
def test_bad_settings_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noise(**options)


def test_a_mask_in_the_text_is_never_scored() -> None:
    x0 = tokens(4, 64)
    x0[:, ::5] = MASK
    noisy = run(x0, full_mask_fraction=1.0)
    assert torch.equal(noisy.scored, x0 != MASK)
    assert torch.equal(noisy.masked, noisy.scored)
