"""Retention is what its definition says, and its intervals cover the truth as often as they claim."""

import math

import numpy as np
import pytest
import torch

from twotower.eval import retention as module
from twotower.eval.answering import ScoredAnswer
from twotower.eval.retention import Interval, mean_retention, not_counted, retention


def replies(*scores, text=""):
    return [ScoredAnswer(text, score, False, None, []) for score in scores]


def pairs(generator, count, share, ar_share):
    """Answers of a mode that has `share` of what ar has right, and ar's."""
    ar = generator.random(count) < ar_share
    return replies(*(ar & (generator.random(count) < share))), replies(*ar)


def test_retention_is_a_ratio_with_its_interval():
    value, low, high = retention(replies(1, 0, 0, 0) * 50, replies(1, 1, 0, 0) * 50)
    assert value == 0.5
    # of the 100 that ar has right, half are the mode's: a spread of sqrt(0.5 · 0.5 / 100)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 / 100), rel=0.15)
    assert low < value < high


def test_pairs_are_drawn_together():
    scores = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    assert retention(replies(*(s / 2 for s in scores)), replies(*scores)) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.95, 0.98, 1.0])
@pytest.mark.parametrize(("count", "tasks"), [(24, 1), (48, 1), (48, 4)])
def test_intervals_hold_the_true_share_near_100_percent(count, share, tasks, monkeypatch):
    monkeypatch.setattr(module, "_RESAMPLES", 400)
    generator = np.random.default_rng(0)
    held = []
    for _ in range(150):
        found = mean_retention([retention(*pairs(generator, count, share, ar_share=0.95)) for _ in range(tasks)])
        held.append(found.low <= share + 1e-9 and share - 1e-9 <= found.high)
    assert np.mean(held) >= 0.9


@pytest.mark.slow
def test_intervals_hold_100_percent_of_a_mode_that_gains_answers_as_it_loses_them(monkeypatch):
    monkeypatch.setattr(module, "_RESAMPLES", 400)
    generator = np.random.default_rng(0)
    held = []
    for _ in range(150):
        shares = []
        for _ in range(4):
            ar, other = generator.random((2, 48)) < 0.9
            shares.append(retention(replies(*np.where(generator.random(48) < 0.1, other, ar)), replies(*ar)))
        found = mean_retention(shares)
        held.append(found.low <= 1 <= found.high)
    assert np.mean(held) >= 0.93


@pytest.mark.slow
def test_intervals_of_probabilities_hold_the_true_share():
    generator = np.random.default_rng(0)
    held = []
    for _ in range(150):
        ar = generator.uniform(0.5, 0.8, 48)
        found = retention(replies(*(ar * generator.uniform(0.8, 1.1, 48))), replies(*ar))
        held.append(found.low <= 0.95 <= found.high)
        assert found.high - found.low < 0.08  # two failures among 50 would make it 0.11
    assert np.mean(held) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 8])
def test_intervals_of_few_probabilities_hold_the_true_share(count, monkeypatch):
    monkeypatch.setattr(module, "_RESAMPLES", 400)
    generator = np.random.default_rng(0)
    held = []
    for _ in range(200):
        ar, kept = generator.uniform(0.5, 0.8, count), generator.uniform(0.3, 0.7, count)
        looped = generator.random(count) < 0.1
        found = retention(replies(*np.where(looped, 0, ar * kept)), replies(*ar))
        held.append(found.low <= 0.45 <= found.high)
    assert np.mean(held) >= 0.92
    assert retention(replies(0.3), replies(0.6)) == (0.5, None, None)


def test_only_a_mode_that_is_ar_by_construction_is_certain_of_questions_not_asked():
    right = replies(*[1] * 48)
    value, low, high = retention(right, right)
    assert (value, high) == (1, 1)
    assert 0.9 < low < 0.96
    assert retention(right, right, exact=True) == (1, 1, 1)
    few = replies(1, *[0] * 9)
    assert retention(few, few, exact=True) == (1, 1, 1)
    # its texts may differ after all, as samples do and at ties of rounded logits
    assert retention(replies(*[1] * 48, text="other"), right, exact=True).low < 0.96


def test_where_ar_scores_nothing_retention_is_undefined():
    assert retention(replies(1, 0), replies(0, 0)) == (None, None, None)


def test_too_few_right_answers_of_ar_give_no_interval():
    scores = replies(1, *[0] * 9)  # one resample in thirty has none
    assert retention(scores, scores) == (1.0, None, None)


def test_the_mean_over_tasks():
    one, two = Interval(0.9, 0.6, 1.0), Interval(0.7, 0.3, 0.7)
    value, low, high = mean_retention([one, two])
    assert value == pytest.approx(0.8)
    assert value - low == pytest.approx(0.25)  # sqrt(0.3² + 0.4²) / 2
    assert high - value == pytest.approx(0.05)
    assert mean_retention([one]) == pytest.approx(one)
    assert mean_retention([one, Interval(0.7, None, None)]) == (0.8, None, None)
    assert mean_retention([one, Interval(None, None, None)]) == mean_retention([]) == (None, None, None)


def test_a_score_that_is_mostly_luck_does_not_count():
    def scoring(right, of):
        return not_counted(replies(*[1] * right, *[0] * (of - right)))

    assert scoring(0, 40) == "ar scores 0"
    assert scoring(7, 40) == "ar scores 0.175 with a standard error of 34% of that, more than 25%"
    assert [scoring(11, 40) is None, scoring(12, 40) is None] == [False, True]
    assert [scoring(15, 4000) is None, scoring(16, 4000) is None] == [False, True]
    assert scoring(2, 2) is None
    assert not_counted(replies(0.4, 0.5, 0.6, 0.3)) is None
