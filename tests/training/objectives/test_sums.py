import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from twotower.config import TwoTowerConfig
from twotower.model.head import Head
from twotower.model.two_tower import TwoTower
from twotower.training.forward.layout import make_layout
from twotower.training.masks.noise import MIN_LEVEL, Corrupted, Noise, corrupt
from twotower.training.objectives import sums as objective
from twotower.training.objectives.sums import Teacher, loss_sums, next_token_targets, token_losses, weigh

REDUCTIONS = ["masked_mean", "example_mean", "elbo"]


def corrupted(x0: Tensor, first: int = 0, *, block_size: int = 4, **noise: Any) -> Corrupted:
    samples = torch.arange(first, first + len(x0))
    scored = torch.arange(x0.shape[1]) >= samples[:, None] % 4  # prompts of several lengths
    return corrupt(x0, scored, samples, seed=0, noise=Noise(**noise), block_size=block_size, mask_token_id=3)


def loss(model: TwoTower, x0: Tensor, noisy: Corrupted, reduction: Any) -> Tensor:
    weight, denominator = weigh(noisy, reduction)
    return loss_sums(model, x0, noisy, weight).losses["cross_entropy"] / denominator


@pytest.mark.parametrize("complementary", [True, False])
def test_reductions_are_what_cached_decoding_gives(complementary: bool, tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny("M*-E", dtype=torch.float64), ids(4, 15)
    noisy = corrupted(x0, complementary=complementary)
    by_row: list[list[float]] = []
    weighted = 0.0
    for row in range(len(noisy.xt)):
        by_row.append([])
        clean, block = x0[row % 4], noisy.layout.block[row % 4]
        for index in block.unique():
            place = (block == index).nonzero()[:, 0]
            state = model.prefill(clean[None, : place[0]])
            with torch.no_grad():
                logits = model.denoiser_logits(
                    noisy.xt[row : row + 1, place], state, tuple(noisy.told[row, place[:1]].tolist())
                )[0]
            picked = noisy.masked[row, place]
            losses = F.cross_entropy(logits[picked], clean[place][picked], reduction="none")
            by_row[-1] += losses.tolist()
            weighted += float(losses.sum()) / float(noisy.level[row, place[0]])
    every = [value for row in by_row for value in row]
    views = 2 if complementary else 1
    expected = {
        "masked_mean": sum(every) / len(every),
        "example_mean": sum(sum(row) / max(len(row), 1) for row in by_row) / len(by_row),
        "elbo": weighted * (1 - MIN_LEVEL) / (int(noisy.scored.sum()) * views),
    }
    for reduction, value in expected.items():
        # `denoiser_logits` rounds to float32
        assert loss(model, x0, noisy, reduction).item() == pytest.approx(value, rel=1e-5)


def gradients(model: TwoTower) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def step(model: TwoTower, x0: Tensor, noisy: Corrupted, parts: list[slice], reduction: Any, whole: Corrupted) -> None:
    """Adds the gradient of some rows of a step whose noise is `whole`."""
    denominator = weigh(whole, reduction).denominator
    for part in parts:
        piece = noisy.rows(part)
        (
            loss_sums(model, x0[part], piece, weigh(piece, reduction).weight).losses["cross_entropy"] / denominator
        ).backward()


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("complementary", [True, False])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(
    reduction: str, complementary: bool, tiny: Callable, ids: Callable, close: Callable
) -> None:
    model, x0 = tiny("M*-E", dtype=torch.float64), ids(6, 15)
    noisy = corrupted(x0, complementary=complementary)
    assert len(set(noisy.masked.sum(1).tolist())) > 2  # otherwise a mean of the parts' means would pass too
    step(model, x0, noisy, [slice(0, 6)], reduction, noisy)
    whole = gradients(model)
    for cut in ([1] * 6, [2, 4], [5, 1], [3, 3]):
        ends = list(itertools.accumulate(cut))
        parts = [slice(end - size, end) for size, end in zip(cut, ends, strict=True)]
        step(model, x0, noisy, parts, reduction, noisy)
        for ours, theirs in zip(gradients(model), whole, strict=True):
            close(ours, theirs, 1e-6)


def rank_gradients(rank: int, model: TwoTower, x0: Tensor, folder: Path) -> None:
    """One of two processes: half of the rows, corrupted here, denominators and gradients summed."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    rows = x0[3 * rank : 3 * rank + 3]
    noisy = corrupted(rows, first=3 * rank)
    weight, denominator = weigh(noisy, "masked_mean")
    total = torch.tensor(denominator, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    (loss_sums(model, rows, noisy, weight).losses["cross_entropy"] / total).backward()
    found = gradients(model)
    for gradient in found:
        torch.distributed.all_reduce(gradient)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(tiny: Callable, ids: Callable, close: Callable, tmp_path: Path) -> None:
    model, x0 = tiny("M*-", dtype=torch.float64), ids(6, 15)
    model.requires_grad_(False)
    model.denoiser_tower.requires_grad_(True)
    loss(model, x0, corrupted(x0), "masked_mean").backward()
    alone = gradients(model)
    torch.multiprocessing.start_processes(rank_gradients, (model, x0, tmp_path), nprocs=2, start_method="fork")
    for rank in range(2):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            close(ours, theirs, 1e-12)


def conditionals(model: TwoTower, x0: Tensor) -> Callable[[int, int, frozenset[int], int], float]:
    """-log p of x0[at] given the clean tokens before its block [start, …) and the revealed ones in it."""

    def negative_log(start: int, end: int, revealed: frozenset[int], at: int) -> float:
        block = torch.tensor([[int(x0[i]) if i in revealed else 3 for i in range(start, end)]])
        state = model.prefill(x0[None, :start])
        with torch.no_grad():
            logits = model.lm_head(model.denoiser_tower.block(block, state, model.time_conditioning(torch.ones(1))))
        return float(F.cross_entropy(logits[0, at - start], x0[at]))

    return negative_log


def any_order(model: TwoTower, x0: Tensor, start: int, end: int) -> list[float]:
    """-log p of a block's tokens for each order in which they may be revealed."""
    negative_log = conditionals(model, x0)
    return [
        sum(negative_log(start, end, frozenset(order[:i]), at) for i, at in enumerate(order))
        for order in itertools.permutations(range(start, end))
    ]


@pytest.fixture
def toy(tiny: Callable) -> TwoTower:
    """A model whose denoiser doesn't read t̂, so that its bound is the mean over orders of revealing."""
    model = tiny("M*", dtype=torch.float64)
    with torch.no_grad():
        model.time_conditioning.block.weight.zero_()
    return model


def test_elbo_is_the_enumerated_bound(toy: TwoTower, ids: Callable) -> None:
    """One block of 4: every mask, weighted with its probability, integrated over t̂."""
    x0 = ids(1, 4)
    layout = make_layout(torch.zeros(1, 4, dtype=torch.int64), 4)
    # polynomials in t̂ of degree 3: 4-point Gauss-Legendre is exact
    nodes = torch.tensor([-0.8611363115940526, -0.3399810435848563, 0.3399810435848563, 0.8611363115940526]).double()
    weights = torch.tensor([0.34785484513745385, 0.6521451548625461, 0.6521451548625461, 0.34785484513745385]).double()
    expectation = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        t = float(MIN_LEVEL + (1 - MIN_LEVEL) * (node + 1) / 2)
        for bits in itertools.product((False, True), repeat=4):
            masked = torch.tensor([bits])
            level = torch.full((1, 4), t)
            scored = torch.ones_like(masked)
            noisy = Corrupted(x0.masked_fill(masked, 3), masked, level, level, scored, layout)
            with torch.no_grad():
                value = loss(toy, x0, noisy, "elbo").item() * 4
            expectation += float(weight) / 2 * t ** sum(bits) * (1 - t) ** (4 - sum(bits)) * value
    orders = any_order(toy, x0[0], 0, 4)
    bound = sum(orders) / len(orders)
    # the part below the least level: at most its width times each token's loss with one mask
    negative_log = conditionals(toy, x0[0])
    below = MIN_LEVEL * sum(negative_log(0, 4, frozenset(range(4)) - {i}, i) for i in range(4))
    assert expectation == pytest.approx(bound - below, rel=1e-5, abs=below * 5e-3)
    likelihood = -math.log(sum(math.exp(-value) for value in orders) / len(orders))
    assert likelihood < bound


@pytest.mark.slow
@pytest.mark.parametrize("level_per", ["block", "example"])
def test_elbo_of_random_draws_converges_to_the_bound(level_per: Any, toy: TwoTower, ids: Callable) -> None:
    x0, rows = ids(1, 4), 3000
    many = x0.expand(rows, -1)
    samples, scored = torch.arange(rows), torch.ones(rows, 4, dtype=torch.bool)
    noise = Noise(level_per=level_per)
    noisy = corrupt(many, scored, samples, seed=0, noise=noise, block_size=4, mask_token_id=3)
    weight, denominator = weigh(noisy, "elbo")
    with torch.no_grad():
        drawn = loss_sums(toy, many, noisy, weight).losses["cross_entropy"].item() / denominator
    # blocks of 4, or of 1 + 3, 2 + 2, 3 + 1, as the grid's offset has it
    bounds = [
        sum(sum(values) / len(values) for values in (any_order(toy, x0[0], a, b) for a, b in blocks)) / 4
        for blocks in ([(0, 4)], [(0, 3), (3, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 4)])
    ]
    # the standard deviation of one draw is about the bound itself
    assert drawn == pytest.approx(sum(bounds) / 4, rel=4 / rows**0.5)


def test_a_step_with_nothing_masked_costs_nothing(tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny("M*"), ids(2, 8)
    scored = torch.zeros(2, 8, dtype=torch.bool)
    noisy = corrupt(x0, scored, torch.arange(2), seed=0, noise=Noise(), block_size=4, mask_token_id=3)
    total = loss_sums(model, x0, noisy, weigh(noisy, "masked_mean").weight).losses["cross_entropy"]
    total.backward()
    assert total == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_context_towers_loss_is_that_of_the_next_token(tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny("M*-E", dtype=torch.float64), ids(2, 15)
    document = torch.tensor([[0] * 6 + [1] * 9, [0] * 15])
    scored = torch.arange(15).expand(2, -1) >= 2
    noisy = corrupt(
        x0, scored, torch.arange(2), seed=0, noise=Noise(), block_size=4, mask_token_id=3, document=document
    )
    weight, _ = weigh(noisy, "masked_mean")
    found = loss_sums(model, x0, noisy, weight, with_ar=True).ar
    expected = 0.0
    for row, pieces in ((0, [(0, 6), (6, 15)]), (1, [(0, 15)])):
        for start, end in pieces:
            logits = model.context_logits(x0[row : row + 1, start:end])[0]
            for at in range(max(start + 1, 2), end):
                expected += float(F.cross_entropy(logits[at - 1 - start], x0[row, at]))
    assert found is not None
    assert found.item() == pytest.approx(expected, rel=1e-5)  # `context_logits` rounds to float32
    assert next_token_targets(x0, scored, document)[1].sum() == 15 - 1 - 1 - 1 + 15 - 2
    assert loss_sums(model, x0, noisy, weight).ar is None


def test_logits_exist_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, sizes: dict, close: Callable) -> None:
    monkeypatch.setattr(objective, "HEAD_ROWS", 8)
    torch.manual_seed(0)
    rows = torch.randn(21, 5, requires_grad=True)
    head = Head(TwoTowerConfig(**sizes | {"pattern": "-", "hidden_size": 5}), torch.float32)
    weight = torch.nn.init.normal_(head.weight)
    targets, factors = torch.randint(4, 40, (21,)), torch.rand(21)
    seen: list[int] = []
    kept: list[int] = []

    head.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
        total = (token_losses(head, rows, targets)["cross_entropy"] * factors).sum()
    assert seen == [8, 8, 5]
    assert max(kept, default=0) < 21 * 40
    teacher = Teacher(head, torch.randn(21, 5), torch.ones(21, dtype=torch.bool))
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
        taught = token_losses(head, rows, targets, ("distillation", "certainty"), {"distillation": teacher})
    assert seen == [8, 8, 5, 8, 8, 8, 8, 5, 5]
    assert max(kept, default=0) < 21 * 40
    assert torch.equal((taught["cross_entropy"] * factors).sum(), total)
    assert taught["distillation"].min() > 0
    expected = (
        F.cross_entropy((rows @ weight.t()).index_fill(1, torch.tensor(3), -torch.inf), targets, reduction="none")
        * factors
    ).sum()
    ours, theirs = (torch.autograd.grad(value, (rows, weight)) for value in (total, expected))
    close(total, expected, 1e-6)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-6)


def test_an_unknown_reduction_raises(ids: Callable) -> None:
    with pytest.raises(ValueError, match="reduction is 'mean', must be one of masked_mean, example_mean, elbo"):
        weigh(corrupted(ids(2, 8)), "mean")  # type: ignore[arg-type]
