"""A target of retention in place of a threshold: which calibrated rule it is, in every driver."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.decoding.unmasking import schedule
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.errors import SettingError
from twotower.model.calibration import CalibratedRule, Calibration
from twotower.model.two_tower import TwoTower

SIZE = 8


def rule(shown: float, tokens_per_nfe: float, seed: int) -> CalibratedRule:
    """A rule with thresholds of its own for each place and number of masks."""
    draw = random.Random(seed)
    table = tuple(tuple(draw.choice([0.0, 0.02, 0.05, 1.0]) for _ in range(SIZE)) for _ in range(SIZE))
    return CalibratedRule(
        risk=0.1, thresholds=table, shown=shown, tokens_per_nfe=tokens_per_nfe, held_out=(None, None, None)
    )


def calibrated(tiny: Callable, *rules: CalibratedRule) -> TwoTower:
    model = tiny("M*-E")
    model.calibration = Calibration(
        block_size=SIZE,
        steps_per_block=16,
        confidence=0.9,
        prompts="some",
        num_prompts=100,
        fingerprint="",
        rules=rules,
    )
    return model


def asked(target: float, **changes: Any) -> SamplingParams:
    return SamplingParams(target_retention=target, block_size=SIZE, max_new_tokens=20, ignore_eos=True, **changes)


RULES = (rule(0.99, 1.5, 1), rule(0.95, 3.0, 2), rule(0.9, 2.5, 3))


def by_hand(model: TwoTower, table: tuple[tuple[float, ...], ...], prompt: list[int], length: int) -> list[int]:
    """The text by the definition: the calls of decoding, and thresholds looked up one by one."""
    state, written = model.prefill([prompt]), []
    mask = model.config.mask_token_id
    while len(written) < length:
        block = [mask] * min(SIZE, length - len(written))
        while mask in block:
            best = model.denoise([block], state)[0].softmax(-1).max(-1)
            masked = [i for i, token in enumerate(block) if token == mask]
            limits = table[len(masked) - 1]
            over = {i: float(best.values[i]) - limits[i] for i in masked}
            now = [i for i in masked if over[i] > 0] or [max(masked, key=lambda i: over[i])]
            block = [int(best.indices[i]) if i in now else token for i, token in enumerate(block)]
        written += block
        state = model.extend([block], state)
    return written


def test_the_fastest_rule_that_was_shown_to_keep_the_target_writes(tiny: Callable) -> None:
    model = calibrated(tiny, *RULES)
    texts = [by_hand(model, r.thresholds, [5, 6], 20) for r in RULES]
    assert len({str(text) for text in texts}) == 3, "else the rules can't be told apart"
    for target, expected in ((0.97, 0), (0.99, 0), (0.95, 1), (0.9, 1), (0.5, 1)):
        assert generate(model, [[5, 6]], asked(target))[0].token_ids == texts[expected]


def test_the_engine_and_batches_write_the_same(tiny: Callable) -> None:
    model = calibrated(tiny, *RULES)
    prompts = [[5, 6], [7], [8, 9, 10], [11, 5], [6]]
    params = [
        asked(0.97, seed=1),
        asked(0.9, seed=2),
        SamplingParams(block_size=11, max_new_tokens=20, ignore_eos=True, commit_rule="entropy_bound", entropy_bound=3),
        asked(0.9, temperature=1.0, seed=3),
        SamplingParams(max_new_tokens=20, ignore_eos=True, confidence_threshold=0.02),
    ]
    alone = [generate(model, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]
    together = generate(model, prompts, params)
    engine = Engine(model, EngineConfig(max_num_requests=3))
    served = engine.generate(prompts, params)
    for one, row, reply in zip(alone, together, served, strict=True):
        assert one.token_ids == row.token_ids == reply.token_ids
        assert one.commit_steps == row.commit_steps == reply.commit_steps


@pytest.mark.parametrize(
    ("rules", "params", "message"),
    [
        (RULES, {"target_retention": 0.995}, "target_retention is 0.995, must be at most 0.99: .*'verified'"),
        ((rule(0.98996, 1.5, 1),), {"target_retention": 0.99}, r"must be at most 0\.9899: "),
        ((), {"target_retention": 0.5}, "must be at most 0: .*'verified'"),
        (RULES, {"target_retention": 0.9, "block_size": 4}, "block_size is 4, must be 8 beside target_retention"),
        (RULES, {"target_retention": 0.9, "steps_per_block": 4}, "steps_per_block is 4, must be 16 beside"),
    ],
)
def test_what_was_not_calibrated_is_refused(tiny: Callable, rules: Any, params: dict, message: str) -> None:
    model = calibrated(tiny, *rules)
    with pytest.raises(SettingError, match=message):
        generate(model, [[5, 6]], SamplingParams(**{"block_size": SIZE, "max_new_tokens": 20, **params}))


def test_a_checkpoint_without_a_calibration_names_the_command(tiny: Callable) -> None:
    with pytest.raises(SettingError, match=r"has no calibration; make one with: twotower calibrate CHECKPOINT PROMPTS"):
        generate(tiny("M*-E"), [[5, 6]], asked(0.9))
    with pytest.raises(SettingError, match="twotower calibrate"):
        Engine(tiny("M*-E")).add([5, 6], asked(0.9))


def test_a_row_of_auto_has_its_target_where_it_runs_as_diffusion(tiny: Callable) -> None:
    model = calibrated(tiny, *RULES)
    params = asked(0.9, mode="auto", allow_loss=True, temperature=0.0)
    at = schedule((params.settled(SIZE, model.sampling),), model.denoiser_device, model.calibration)
    assert at.tables[0] is not None
    assert at.tables[0].tolist() == RULES[1].table.tolist()
    prompts = [[5, 6], [7], [8, 9, 10]]
    for text in Engine(model).generate(prompts, [params] * 3):
        assert len(text.token_ids) == 20
