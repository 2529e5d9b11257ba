import json
import math
import random

import pytest

from twotower.training.config import TrainConfig
from twotower.training.run.schedule import WINDOW, Guard


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    schedule = TrainConfig(steps=10, learning_rate=2.0, warmup_steps=4, decay_steps=4).schedule
    assert [schedule.rate(s) for s in range(10)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    flat = TrainConfig(steps=3, learning_rate=2.0, warmup_steps=0).schedule
    assert [flat.rate(s) for s in range(3)] == [2.0] * 3


def test_the_rate_falls_to_its_floor() -> None:
    schedule = TrainConfig(
        steps=100, learning_rate=1e-4, final_learning_rate=1e-6, warmup_steps=0, decay_steps=50
    ).schedule
    rates = [schedule.rate(s) for s in range(101)]
    assert rates[50] == pytest.approx(1e-4)
    assert rates[75] == pytest.approx((1e-4 + 1e-6) / 2)
    assert rates[100] == pytest.approx(1e-6)


def test_what_is_not_finite_is_a_fault_and_a_high_loss_once_others_are_known() -> None:
    guard = Guard(spike_factor=2.0, skip_limit=10)
    assert guard.judge(0, math.nan, 1.0) == "not finite"
    assert guard.judge(1, 1.0, math.inf) == "not finite"
    assert [guard.judge(2 + s, 5.0 + 0.1 * s, 1.0) for s in range(16)] == [None] * 16
    assert guard.judge(18, 12.7, 1.0) is None  # nine in ten are below 6.4
    assert guard.judge(19, 15.0, 1.0) == "spike"
    assert guard.num_skipped == 3
    assert all(Guard(spike_factor=0, skip_limit=0).judge(s, 10.0**s, 1.0) is None for s in range(30))


def test_hard_rows_are_no_spikes() -> None:
    """Losses as they are once most answers are learnt: one in thirty is three times the median."""
    rng = random.Random(0)
    losses = [0.04 * math.exp(0.6 * rng.gauss(0, 1)) for _ in range(2000)]
    assert sum(loss > 0.12 for loss in losses) > 40
    guard = Guard(spike_factor=3.0, skip_limit=10)
    assert sum(guard.judge(step, loss, 1.0) is not None for step, loss in enumerate(losses)) <= 10
    assert guard.judge(2000, 1.0, 1.0) == "spike"


def test_too_many_skipped_steps_in_a_window_stop_the_run() -> None:
    guard = Guard(spike_factor=0, skip_limit=2)
    for step in (0, 50, WINDOW, WINDOW + 50, 2 * WINDOW):  # never three in a hundred
        guard.judge(step, math.nan, 1.0)
    with pytest.raises(ValueError, match=r"3 of the last 100 steps were skipped, .* at most skip_limit=2"):
        guard.judge(2 * WINDOW + 1, math.nan, 1.0)


def test_a_restored_guard_goes_on_as_the_first_would() -> None:
    guard = Guard(spike_factor=2.0, skip_limit=3)
    for step in range(40):
        guard.judge(step, math.nan if step == 7 else 3 + step / 7, 1.0)
    other = Guard(spike_factor=2.0, skip_limit=3).restored(json.loads(json.dumps(guard.state())))
    for step, loss in enumerate([9.0, 40.0, 9.5, math.nan], start=40):
        assert guard.judge(step, loss, 1.0) == other.judge(step, loss, 1.0)
    assert guard.state() == other.state()
    assert guard.num_skipped == 3
