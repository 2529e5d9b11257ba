import dataclasses
from collections.abc import Callable

import torch

from twotower.model.one_tower import OneTower


def test_fresh_weights_are_reproducible_and_of_the_right_size(tiny: Callable) -> None:
    config = dataclasses.replace(tiny("M*-E").config, vocab_size=500, hidden_size=64)
    model, same, other = OneTower(config), OneTower(config), OneTower(config)
    model.initialise_(1)
    same.initialise_(1)
    other.initialise_(2)
    tensors = model.released_tensors()
    assert all(torch.equal(t, same.released_tensors()[n]) for n, t in tensors.items())
    assert any(not torch.equal(t, other.released_tensors()[n]) for n, t in tensors.items())
    std = {name: float(tensor.std()) for name, tensor in tensors.items() if tensor.ndim == 2}
    assert 0.019 < std["backbone.embeddings.weight"] < 0.021
    assert 0.008 < std["backbone.layers.1.mixer.o_proj.weight"] < 0.012  # 0.02 / √4 layers
    steps = torch.nn.functional.softplus(tensors["backbone.layers.0.mixer.dt_bias"])
    assert bool(((steps > 0.9e-3) & (steps < 0.11)).all())
    rates = tensors["backbone.layers.0.mixer.A_log"].exp()
    assert bool(((rates >= 1) & (rates <= 16)).all())
    assert rates.unique().numel() == rates.numel()


def test_fresh_mamba_1_and_rg_lru_layers_forget_at_usual_rates(tiny: Callable) -> None:
    """Norms of step sizes, B and C start at 1 whatever the offset of other norms."""
    model = OneTower(dataclasses.replace(tiny("SR").config, norm_offset=1.0, mamba_inner_epsilon=1e-6))
    model.initialise_(1)
    tensors = {name.removeprefix("backbone.layers."): tensor for name, tensor in model.released_tensors().items()}
    assert all(bool((tensors[f"0.mixer.{name}_norm.weight"] == 1).all()) for name in ("dt", "b", "c"))
    assert bool((tensors["0.norm.weight"] == 0).all())
    steps = torch.nn.functional.softplus(tensors["0.mixer.dt_bias"])
    assert bool(((steps > 0.9e-3) & (steps < 0.11)).all())
    decays = torch.exp(-4 * torch.nn.functional.softplus(tensors["1.mixer.recurrent_param"]))  # gates half open
    assert bool(((decays > 0.899) & (decays < 0.9991)).all())


def test_a_tied_head_is_the_embedding(tiny: Callable) -> None:
    model = OneTower(tiny("llama").config)
    assert model.lm_head.weight is model.tower.embeddings
    assert "lm_head.weight" not in model.released_tensors()
