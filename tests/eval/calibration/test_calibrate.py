"""Choosing rules by what they lose."""

import dataclasses
from typing import Any

import pytest

from twotower.decoding.output import GenerationStats
from twotower.decoding.params import SamplingParams
from twotower.eval.answering import Question, ScoredAnswer
from twotower.eval.calibration import calibrate as module
from twotower.eval.calibration.bounds import kept_share
from twotower.eval.calibration.calibrate import RISKS, CalibrationConfig, calibrate, deal
from twotower.eval.tasks import Example
from twotower.model.two_tower import TwoTower

STATS = GenerationStats(denoiser_calls=1, context_calls=2, seconds_to_first_token=0.1, seconds_total=0.2, num_tokens=4)


def asked(n: int) -> list[Question]:
    example = Example(prompt="", scorer="likelihood", max_new_tokens=6)
    return [Question((5, i % 200), example) for i in range(n)]


def scored(scores: list[float]) -> list[ScoredAnswer]:
    return [ScoredAnswer("a", score, False, STATS, ()) for score in scores]


def test_every_question_has_one_part() -> None:
    questions = asked(103)
    parts = deal(questions, 0)
    assert [len(part) for part in parts] == [25, 53, 25]
    assert sorted(q.prompt_ids for part in parts for q in part) == sorted(q.prompt_ids for q in questions)
    assert deal(questions, 0) == parts != deal(questions, 1)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts given: 47; a calibration needs at least 48"):
        deal(asked(47), 0)


def test_what_rules_are_shown_to_keep_follows_from_their_losses(
    model: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of the answers to the choosing half; never more than that of the rule before; until half is lost."""
    wrong = [1, 0, 3, 2, 9, 30]
    told: list[str] = []

    def answers(trial: TwoTower, questions: list[Question], params: SamplingParams) -> list[ScoredAnswer]:
        if params.mode == "ar":
            return scored([1.0] * len(questions))
        assert params.target_retention is not None
        assert params.confidence_threshold is None
        assert trial.calibration is not None
        number = RISKS.index(trial.calibration.rules[0].risk)
        lost = wrong[number] if len(questions) == 50 else 0
        stats = dataclasses.replace(STATS, num_tokens=4 + number)
        return [dataclasses.replace(a, stats=stats) for a in scored([0.0] * lost + [1.0] * (len(questions) - lost))]

    monkeypatch.setattr(module, "answer_questions", answers)
    found = calibrate(model, asked(100), CalibrationConfig(), prompts="p", fingerprint="f", advance=told.append)
    bounds = [kept_share([0.0] * k + [1.0] * (50 - k), [1.0] * 50, 0.9) for k in wrong]
    assert [rule.shown for rule in found.rules] == pytest.approx(
        [bounds[0], bounds[0], bounds[2], bounds[2], bounds[4]]
    )
    assert [rule.tokens_per_nfe for rule in found.rules] == [4, 5, 6, 7, 8]
    assert [rule.risk for rule in found.rules] == list(RISKS[:5])
    assert all(rule.held_out[0] == 1.0 for rule in found.rules)
    assert (found.most, found.num_prompts, found.fingerprint) == (pytest.approx(bounds[0]), 100, "f")
    assert found.fastest(bounds[0]) == found.rules[1]
    assert found.fastest(bounds[2]) == found.rules[3]
    assert found.fastest(0.5) == found.rules[4]
    assert found.fastest(0.99) is None
    assert model.calibration is None
    assert len(told) == 2 + 6


def test_where_ar_scores_nothing_there_is_nothing_to_keep(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "answer_questions", lambda _, questions, params: scored([0.0] * len(questions)))
    with pytest.raises(ValueError, match="ar scores 0"):
        calibrate(model, asked(60), CalibrationConfig(), prompts="p", fingerprint="f")


def test_a_model_whose_denoiser_is_good_is_calibrated(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it on a tiny model: rules get bolder and never better than shown."""
    found = calibrate(model, asked(48), CalibrationConfig(steps_per_block=8), prompts="p", fingerprint="f")
    assert (found.block_size, found.steps_per_block) == (8, 8)
    for rule in found.rules:
        assert len(rule.thresholds) == 8
        assert rule.shown >= 0.5
    assert [r.shown for r in found.rules] == sorted((r.shown for r in found.rules), reverse=True)


@pytest.mark.parametrize("bad", [{"confidence": 1.0}, {"confidence": 0.5}, {"seed": -1}, {"steps_per_block": 0}])
def test_bad_settings_raise(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CalibrationConfig(**bad)
