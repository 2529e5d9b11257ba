"""Settings of a run: phases, and what is refused with its name, value and rule."""

import math
from typing import Any

import pytest

from twotower.errors import SettingError
from twotower.training.config import DenoisingConfig, Phase, Share, TrainConfig, parse_phases, parse_shares


def test_phases_hold_from_their_first_step_on() -> None:
    config = DenoisingConfig(phases=(Phase(0, 32), Phase(4, 32), Phase(6, 16)))
    assert [config.block_size(step, 8) for step in range(8)] == [32] * 6 + [16] * 2
    assert DenoisingConfig().block_size(3, 8) == 8


def test_phases_are_read_from_text() -> None:
    assert parse_phases("0:32,2000:16") == (Phase(0, 32), Phase(2000, 16))
    assert parse_phases("") == ()


def test_shares_are_names_with_weights() -> None:
    assert parse_shares("cross_entropy, certainty:0.5") == (Share("cross_entropy", 1.0), Share("certainty", 0.5))
    assert parse_shares("") == ()
    with pytest.raises(SettingError, match="certainty:x"):
        parse_shares("certainty:x")
    with pytest.raises(SettingError, match="'certainty:', must be a name and a number"):
        parse_shares("cross_entropy,certainty:")


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"full_mask_fraction": 1.5}, "a number in [0, 1]"),
        ({"level_per": "row"}, "one of block, example"),
        ({"later_weight": -1.0}, "a number of at least 0"),
        ({"reduction": "sum"}, "one of masked_mean, example_mean, elbo"),
        ({"later_weight": 0.1, "complementary": True}, "0 with complementary"),
        ({"full_mask_fraction": 0.25, "reduction": "elbo"}, "0 with reduction=elbo"),
        ({"context": "half"}, "one of frozen, trained, tied"),
        ({"ar_weight": -1.0, "context": "trained"}, "a number of at least 0"),
        ({"trajectory_passes": 0}, "an integer of at least 1"),
        ({"trajectory_threshold": 1.5}, "a number in [0, 1]"),
        ({"complementary": True, "masks": (Share("drafting", 1.0),)}, "False with drafting"),
        ({"complementary": True, "objective": (Share("consistency", 1.0),)}, "False with consistency"),
        ({"trajectory_passes": 2}, "left out where masks has no trajectory"),
        ({"trajectory_threshold": 0.5}, "left out where masks has no trajectory"),
        ({"full_mask_fraction": 0.5, "masks": (Share("prefix", 1.0),)}, "left out where masks has no noise"),
        ({"later_weight": 0.5, "masks": (Share("prefix", 1.0),)}, "left out where masks has no noise"),
        ({"level_per": "example", "masks": (Share("prefix", 1.0),)}, "left out where masks has no noise"),
        ({"ar_weight": 0.5}, "0 for a frozen context tower"),
        ({"lora_rank": -1}, "an integer of at least 0"),
        ({"lora_rank": 2, "context": "tied"}, "0 with context=tied"),
        ({"phases": (Phase(1, 8),)}, "of steps that start at 0 and rise"),
        ({"phases": (Phase(0, 8), Phase(0, 4))}, "of steps that start at 0 and rise"),
        ({"phases": (Phase(0, 0),)}, "of blocks of at least 1 token"),
        ({"later_weight": 1.0, "full_mask_fraction": 1.0}, "0.0 with full_mask_fraction=1, where every block"),
        ({"level_per": "example", "full_mask_fraction": 1.0}, "block with full_mask_fraction=1, where every block"),
        ({"complementary": True, "full_mask_fraction": 1.0}, "False with full_mask_fraction=1, where every block"),
    ],
)
def test_bad_objectives_raise(changed: dict[str, Any], rule: str) -> None:
    with pytest.raises(SettingError) as raised:
        DenoisingConfig(**changed)
    _check(raised.value, changed, rule)


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("objective", "entropy", "of cross_entropy, certainty, consistency, distillation, acceptance"),
        ("objective", "certainty,certainty:2", "of cross_entropy, certainty, consistency"),
        ("objective", "certainty:nan", "of weights above 0"),
        ("objective", "certainty:0", "of weights above 0"),
        ("masks", "uniform", "of noise, drafting, prefix, trajectory, each at most once"),
    ],
)
def test_bad_shares_raise_as_they_were_given(name: str, text: str, rule: str) -> None:
    with pytest.raises(SettingError) as raised:
        DenoisingConfig(**{name: parse_shares(text)})  # type: ignore[arg-type]
    _check(raised.value, {name: text}, rule)


def test_bad_masks_raise() -> None:
    with pytest.raises(SettingError, match="must be a tuple of Share; or give a text"):
        DenoisingConfig(objective=("certainty",))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="masks is 'prefix', must be noise with reduction=elbo"):
        DenoisingConfig(masks=parse_shares("noise,prefix"), reduction="elbo", full_mask_fraction=0.0)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"steps": 0}, "an integer of at least 1"),
        ({"steps": 2.5}, "an integer of at least 1"),
        ({"batch_size": -1}, "an integer of at least 1"),
        ({"checkpoint_every": 0}, "an integer of at least 1"),
        ({"learning_rate": 0.0}, "a number above 0"),
        ({"learning_rate": math.nan}, "a number above 0"),
        ({"final_learning_rate": 1.0}, "in [0, 0.001], which is learning_rate"),
        ({"warmup_steps": -1}, "an integer of at least 0"),
        ({"final_learning_rate": 1e-5}, "0 without decay_steps, over which the rate falls to it"),
        (
            {"decay_steps": 5, "final_learning_rate": 1e-3},
            "0 with final_learning_rate=0.001, which is learning_rate: nothing falls",
        ),
        ({"decay_steps": 6, "steps": 5}, "in [0, 5], which is steps"),
        ({"seed": -1}, "an integer in [0, 2**63)"),
        ({"seed": 2**63}, "an integer in [0, 2**63)"),
        ({"weight_decay": math.inf}, "a number of at least 0"),
        ({"max_grad_norm": 0.0}, "a number above 0"),
        ({"ema_decay": 1.0}, "a number in [0, 1)"),
        ({"spike_factor": 0.5}, "above 1, or 0 to allow any loss"),
        ({"skip_limit": -1}, "an integer of at least 0"),
        ({"micro_batch_size": -1}, "an integer of at least 0"),
        ({"bf16": 1}, "True or False"),
    ],
)
def test_bad_runs_raise(changed: dict[str, Any], rule: str) -> None:
    with pytest.raises(SettingError) as raised:
        TrainConfig(**changed)
    _check(raised.value, changed, rule)


def _check(error: SettingError, changed: dict[str, Any], rule: str) -> None:
    name, value = next(iter(changed.items()))
    assert error.name == name
    assert repr(error.value) == repr(value)  # nan is not itself
    assert error.rule.startswith(rule)
