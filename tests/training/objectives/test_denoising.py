from collections.abc import Callable

import pytest

from twotower.errors import SettingError
from twotower.training.config import DenoisingConfig
from twotower.training.objectives.denoising import Denoising


def test_layers_that_run_together_are_a_group_and_every_layer_is_in_one(tiny: Callable) -> None:
    model = tiny("M*-E*-", denoiser_layers=(1, 3))
    context, denoiser = model.context_tower.stack, model.denoiser_tower.stack
    groups = Denoising(model, DenoisingConfig()).layer_groups()
    assert groups[:4] == [[context[0]], [context[1], denoiser[0]], [context[2]], [context[3], denoiser[1]]]
    assert groups[4:] == [[context[4]], [context[5]]]


def test_towers_of_different_layers_can_not_be_one(tiny: Callable) -> None:
    with pytest.raises(SettingError, match=r"context is 'tied', must be 'frozen' or 'trained' .* layers \[1, 3\]"):
        Denoising(tiny("M*-E", denoiser_layers=(1, 3)), DenoisingConfig(context="tied"))
