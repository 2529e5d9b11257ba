"""What the table says of a mode is what the mode does."""

from collections.abc import Callable
from typing import Any, get_args

import pytest

from twotower.decoding.generate import generate, stream
from twotower.decoding.modes import EXACT_MODES, MODES, Mode, StepMode
from twotower.decoding.params import SamplingParams


def test_the_table_has_every_mode_that_can_be_asked_for() -> None:
    assert tuple(MODES) == get_args(StepMode)
    assert all(mode.name == name and mode.summary.endswith(".") for name, mode in MODES.items())
    assert {*MODES, "auto"} == set(get_args(Mode))


@pytest.mark.parametrize("name", MODES)
def test_calls_and_blocks_are_as_the_table_says(name: Any, tiny: Callable) -> None:
    mode, params = (
        MODES[name],
        SamplingParams(mode=name, max_new_tokens=12, ignore_eos=True, block_size=4, adaptive_draft=False),
    )
    steps = list(stream(tiny("M*-E"), [5, 6], params, every_step=True))
    [result] = generate(tiny("M*-E"), [[5, 6]], params)
    # a draft for the last token would be of no use
    assert result.stats.denoiser_calls == (len(steps) - (name == "verified") if mode.uses_denoiser else 0)
    # the prompt's call; ar's first token comes from it, and the last block is not absorbed
    assert result.stats.context_calls == {True: 3, False: len(steps) + (name != "ar")}[mode.fills_blocks]
    assert all((step.block is not None) == mode.fills_blocks for step in steps)
    assert all(step.tokens for step in steps) or mode.fills_blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_a_mode_reads_the_settings_that_it_lists_and_no_others(name: Any, tiny: Callable) -> None:
    model = tiny("M*-E")
    changed = {"block_size": 3, "steps_per_block": 2, "confidence_threshold": 0.0, "adaptive_draft": False}

    def outcome(**settings: Any) -> Any:
        params = SamplingParams(
            mode=name, max_new_tokens=24, ignore_eos=True, **{"confidence_threshold": 1.0, **settings}
        )
        [result] = generate(model, [[5, 6]], params)
        return result.commit_steps, result.stats.denoiser_calls

    plain = outcome()
    differ = {setting for setting, value in changed.items() if outcome(**{setting: value}) != plain}
    assert differ <= set(MODES[name].settings)
    assert bool(differ) == bool(MODES[name].settings)


@pytest.mark.parametrize("name", EXACT_MODES)
def test_exact_modes_write_what_ar_writes(name: Any, tiny: Callable) -> None:
    model = tiny("M*-E")
    ours, ar = (generate(model, [[5, 6]], SamplingParams(mode=m, max_new_tokens=20))[0].token_ids for m in (name, "ar"))
    assert ours == ar
