from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.model.block_parallel import block_parallel_hidden
from twotower.model.two_tower import TwoTower

PATTERNS = ["*", "-*", "*E", "*-E*", "llama"]


def grid(length: int, block_size: int, offset: int) -> Tensor:
    return (torch.arange(length) + offset) // block_size


def noisy(x0: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Some masks, and a level per row and block."""
    torch.manual_seed(0)
    xt = x0.masked_fill(torch.rand(x0.shape) < 0.5, 3)
    return xt, torch.rand(x0.shape[0], int(block.max()) + 1)[:, block]


def logits(model: TwoTower, x0: Tensor, xt: Tensor, t: Tensor, block: Tensor) -> Tensor:
    with torch.no_grad():
        return model.lm_head(block_parallel_hidden(model, x0, xt, t, block))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block_size", [4, 8, 16])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_block_is_what_cached_decoding_computes(
    pattern: str, block_size: int, offset: int, tiny: Callable, ids: Callable, close: Callable
) -> None:
    model, x0 = tiny(pattern, dtype=torch.float64), ids(2, 27)
    block = grid(27, block_size, offset)
    xt, t = noisy(x0, block)
    trained = logits(model, x0, xt, t, block)
    for index in block.unique():
        start, end = (block == index).nonzero()[[0, -1], 0].tolist()
        state = model.prefill(x0[:, :start])
        with torch.no_grad():
            decoded = model.denoiser_logits(xt[:, start : end + 1], state, t[:, start])
            wide = model.lm_head(
                model.denoiser_tower.block(xt[:, start : end + 1], state, model.time_conditioning(t[:, start]))
            )
        close(trained[:, start : end + 1], wide, 1e-10)  # float64 in another order of sums
        close(decoded, wide, 1e-6)  # `denoiser_logits` rounds to float32


@pytest.mark.parametrize("pattern", ["*-E*", "llama"])
def test_no_block_sees_its_own_clean_tokens_or_anything_later(pattern: str, tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny(pattern, dtype=torch.float64), ids(1, 24)
    block = grid(24, 8, 0)
    xt, t = noisy(x0, block)
    before = logits(model, x0, xt, t, block)

    def moved(x0: Tensor, xt: Tensor) -> list[bool]:
        # not to the bit: another token goes to other experts, whose products then have other shapes
        return ((logits(model, x0, xt, t, block) - before).abs() > 1e-9).any(-1)[0].tolist()

    for at in range(24):
        changed = x0.clone()
        changed[0, at] = (changed[0, at] + 1) % 40
        # clean tokens reach later blocks only, and all of them
        assert moved(changed, xt) == (block > block[at]).tolist()
        changed = xt.clone()
        changed[0, at] = (changed[0, at] + 1) % 40
        # noisy tokens reach their own block only, both ways
        assert moved(x0, changed) == (block == block[at]).tolist()


def test_levels_of_other_blocks_do_not_matter(tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny("llama", dtype=torch.float64), ids(1, 24)
    block = grid(24, 8, 0)
    xt, t = noisy(x0, block)
    other = torch.where(block == 1, 0.123, t)
    moved = (logits(model, x0, xt, t, block) != logits(model, x0, xt, other, block)).any(-1)[0]
    assert moved.tolist() == (block == 1).tolist()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_reach_the_denoiser_and_not_the_context(pattern: str, tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny(pattern, dtype=torch.float64), ids(2, 16)
    block = grid(16, 8, 0)
    xt, t = noisy(x0, block)
    hidden = block_parallel_hidden(model, x0, xt, t, block)
    model.lm_head(hidden).square().mean().backward()
    context = [*model.context_tower.parameters(), *model.context_lm_head.parameters()]
    assert all(p.grad is None for p in context)
    trained = {n: p.grad for n, p in model.named_parameters() if n.startswith(("denoiser", "lm_head", "time"))}
    # the router's correction bias only chooses
    without = {n for n, g in trained.items() if g is None}
    assert all(n.endswith("correction_bias") for n in without)
    assert all(g.isfinite().all() and bool(g.any()) for n, g in trained.items() if n not in without)


def test_gradients_are_right(tiny: Callable, ids: Callable) -> None:
    """A finite difference along a random direction of every denoiser parameter at once."""
    model, x0 = tiny("*-E", dtype=torch.float64), ids(2, 16)
    block = grid(16, 8, 3)
    xt, t = noisy(x0, block)
    parameters = [*model.denoiser_tower.parameters(), *model.time_conditioning.parameters()]

    def loss() -> Tensor:
        return block_parallel_hidden(model, x0, xt, t, block).sin().sum()

    loss().backward()
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    step, ends = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                if p.grad is not None:
                    p += sign * step * d
            ends.append(loss())
    # a central difference in float64 errs by about step² and 1e-16/step
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["M", "*M"])
def test_mamba_layers_raise(pattern: str, tiny: Callable, ids: Callable) -> None:
    x0 = ids(1, 8)
    with pytest.raises(ValueError, match=f"{pattern.replace('*', '[*]')} has M layers"):
        block_parallel_hidden(tiny(pattern), x0, x0, torch.ones(1, 8), grid(8, 4, 0))
