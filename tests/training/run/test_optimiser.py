import pytest
import torch
from torch import nn

from twotower.training.run.optimiser import Optimiser, total_norm


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(5))}


def test_an_update_is_adamw_with_a_clipped_gradient() -> None:
    ours, theirs = parameters(), parameters()
    optimiser = Optimiser(ours, {}, weight_decay=0.1, ema_decay=0.0)
    reference = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(3):
        for both in (ours, theirs):
            sum((p * (p + step)).sum() for p in both.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.5)
        assert total_norm(optimiser.gradients()) == pytest.approx(norm.item())
        assert norm > 1.5
        optimiser.update(0.01, 1.5, norm.item())
        reference.step()
        optimiser.clear()
        reference.zero_grad()
        assert optimiser.gradients() == []
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name])


def test_gradients_of_a_coarse_parameter_add_up_in_float32() -> None:
    exact = torch.full((1,), 1.0)
    coarse = nn.Parameter(exact.bfloat16())
    optimiser = Optimiser({"a": coarse}, {"a": exact}, weight_decay=0.0, ema_decay=0.0)
    for gradient in (1.0, 2**-12, 2**-12):  # bf16 would lose the small ones
        (coarse * gradient).sum().backward()
    assert coarse.grad is None
    assert optimiser.gradients()[0].item() == 1 + 2**-11
    optimiser.update(2**-10, 10.0, 1.0)
    master = optimiser.tensors()["weights"]["a"]
    assert master.item() == pytest.approx(1 - 2**-10)
    assert coarse.item() == master.bfloat16().item() == 1.0
    optimiser.masters["a"].data.fill_(3.0)
    optimiser.round_()
    assert coarse.item() == 3.0


def test_a_state_has_all_moments_from_the_start_and_a_mean_if_asked_for() -> None:
    plain = Optimiser(parameters(), {}, weight_decay=0.0, ema_decay=0.0).tensors()
    assert sorted(plain) == ["exp_avg", "exp_avg_sq", "step", "weights"]
    assert all(sorted(members) == ["a", "b"] for members in plain.values())
    assert "ema" in Optimiser(parameters(), {}, weight_decay=0.0, ema_decay=0.5).tensors()


def test_the_running_mean_takes_the_weights_place_and_gives_it_back() -> None:
    exact = torch.full((2,), 1 + 2**-10)
    coarse, fine = nn.Parameter(exact.bfloat16()), nn.Parameter(torch.ones(3))
    optimiser = Optimiser({"a": coarse, "b": fine}, {"a": exact}, weight_decay=0.0, ema_decay=0.5)
    before = {name: master.detach().clone() for name, master in optimiser.masters.items()}
    for mean in optimiser.ema.values():
        mean.fill_(3 + 2**-10)
    with optimiser.averaged():
        assert torch.equal(fine.detach(), torch.full((3,), 3 + 2**-10))
        assert torch.equal(coarse.detach(), torch.full((2,), 3.0, dtype=torch.bfloat16))
    assert all(torch.equal(master, before[name]) for name, master in optimiser.masters.items())
    assert torch.equal(coarse.detach(), before["a"].bfloat16())
    assert all((mean == 3 + 2**-10).all() for mean in optimiser.ema.values())
