import math
from typing import Any

import pytest

from twotower.training.denoising import DenoisingConfig, Phase


def test_phases_hold_from_their_first_step_on() -> None:
    config = DenoisingConfig(phases=(Phase(0, 32), Phase(4, 32), Phase(6, 16)))
    assert [config.block_size(step, 8) for step in range(8)] == [32] * 6 + [16] * 2
    assert DenoisingConfig().block_size(3, 8) == 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"full_mask_fraction": 1.5}, r"full_mask_fraction is 1.5, must be in \[0, 1\]"),
        ({"level_per": "row"}, "level_per is 'row', must be block or example"),
        ({"later_weight": -1.0}, "later_weight is -1.0, must be 0 or more"),
        ({"reduction": "sum"}, "reduction is 'sum', must be one of masked_mean, example_mean, elbo"),
        (
            {"later_weight": 0.1, "complementary": True},
            "later_weight is 0.1 with complementary, must be 0: .*; drop one",
        ),
        ({"reduction": "elbo"}, "reduction is elbo, .*; set full_mask_fraction and later_weight to 0"),
        ({"context": "half"}, "context is 'half', must be frozen, trained or tied"),
        ({"context": "trained", "ar_weight": -1.0}, "ar_weight is -1.0, must be 0 or more"),
        ({"distil_weight": math.nan}, "distil_weight is nan, must be 0 or more"),
        ({"ar_weight": 0.5}, "ar_weight is 0.5 for a frozen context tower; train it"),
        ({"lora_rank": -1}, "lora_rank is -1, must be 1 or more, or 0"),
        ({"lora_rank": 2, "context": "tied"}, "lora_rank is 2 with context=tied, must be 0 unless it is frozen"),
        ({"phases": (Phase(1, 8),)}, r"phases start at \[1\], must start at 0 and rise"),
        ({"phases": (Phase(0, 8), Phase(0, 4))}, r"phases start at \[0, 0\], must start at 0 and rise"),
        ({"phases": (Phase(0, 0),)}, r"phases have blocks of \[0\], must be 1 or more"),
    ],
)
def test_bad_settings_raise(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingConfig(**changed)
