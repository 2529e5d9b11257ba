from collections.abc import Callable

import torch

from twotower.model.one_tower import OneTower
from twotower.model.two_tower import TwoTower
from twotower.training.run.low_rank import add_low_rank_
from twotower.training.run.precision import coarse_parameters, compute_in_


def test_a_lowered_model_is_one_of_that_dtype(tiny: Callable) -> None:
    for model in (tiny("M*-E"), OneTower(tiny("M*-E").config)):
        compute_in_(model, torch.bfloat16, ())
        expected = type(model)(model.config, dtype=torch.bfloat16)
        assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in expected.named_parameters()}
        tower = model.denoiser_tower if isinstance(model, TwoTower) else model.tower
        assert tower.activation_dtype == torch.bfloat16
    assert tiny("*").denoiser_tower.activation_dtype == torch.float32


def test_what_is_kept_stays_as_it_is(tiny: Callable) -> None:
    model = tiny("M*-E")
    compute_in_(model, torch.bfloat16, list(model.denoiser_tower.parameters()))
    assert {p.dtype for p in model.denoiser_tower.parameters()} == {torch.float32}
    assert model.context_tower.embeddings.dtype == torch.bfloat16
    assert model.denoiser_tower.activation_dtype == torch.bfloat16


def test_additions_of_low_rank_are_not_coarse_but_what_they_are_added_to_is(tiny: Callable) -> None:
    model = tiny("M*-E")
    before = sum(p.numel() for p in coarse_parameters(model, torch.bfloat16))
    add_low_rank_(model.denoiser_tower, 2)
    assert sum(p.numel() for p in coarse_parameters(model, torch.bfloat16)) == before
