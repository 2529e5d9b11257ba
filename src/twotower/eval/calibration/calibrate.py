"""Finds commit rules of `diffusion` that keep a promised share of `ar`'s score.

It is Learn then Test (Angelopoulos et al. 2021) with fixed-sequence testing. The questions are dealt into three parts:

1. `fit`: an error model says how likely a proposed token is to be wrong, by its probability, its place and the number
   of masks. A rule commits what is wrong with a chance below its risk; the risks make a sequence of rules, from safe to
   bold, whose thresholds are fixed before any other question is seen.
2. `choose`: all rules answer these. What a rule keeps is its expected score divided by `ar`'s. It is shown to keep the
   lower bound on that, or what the rule before it was shown to keep if that is less. So for any target, the rules that
   were shown to keep it are those for which "it keeps less" is rejected at the level 1 − confidence, in sequence until
   the first that can't be; with a chance of `confidence` all of them keep the target.
3. `held_out`: says what came of it, on questions that had no part in any of this.
"""

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from twotower.decoding.params import SamplingParams
from twotower.eval.answering import Question, answer_questions
from twotower.eval.calibration.bounds import kept_share
from twotower.eval.calibration.observations import observe
from twotower.eval.calibration.thresholds import fit
from twotower.eval.report import tokens_per_call
from twotower.eval.retention import retention
from twotower.model.calibration import CalibratedRule, Calibration
from twotower.model.two_tower import TwoTower
from twotower.options import check_options, option

RISKS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.06, 0.1, 0.15, 0.22, 0.3, 0.4)
# Rules that follow one which may lose this much are not tried: nobody would ask for them.
_LEAST_SHOWN = 0.5
# With fewer questions to choose with, even rules that never lost anything could not be promised to keep 88 %.
_FEWEST_PROMPTS = 48
# Texts are watched as they are written under a safe and under a bold rule, so that many and few masks are seen.
_WATCHED = (0.5, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How to calibrate.

    `confidence` is the chance that a rule keeps what it is shown to keep. `seed` deals the questions into parts.
    """

    confidence: float = option(
        0.9, "Chance that what a rule was shown to keep, it keeps.", above=0.5, below=1, fix="0.9 is usual"
    )
    steps_per_block: int = option(16, "Most denoising steps of a block.", least=1, most=1 << 16)
    seed: int = option(0, "Deals the prompts into those that fit, choose and report.", least=0)

    def __post_init__(self) -> None:
        check_options(self)


class Parts(NamedTuple):
    """The questions by what they are for."""

    fit: list[Question]
    choose: list[Question]
    held_out: list[Question]


def deal(questions: Sequence[Question], seed: int) -> Parts:
    """A quarter of the questions to fit, half to choose, a quarter to report, at random. Raises ValueError for too few
    of them."""
    if len(questions) < _FEWEST_PROMPTS:
        raise ValueError(
            f"prompts given: {len(questions)}; a calibration needs at least {_FEWEST_PROMPTS}, and 600 to "
            "promise 99 %; give more prompts of the kind that will be asked"
        )
    dealt = random.Random(seed).sample(list(questions), len(questions))
    first, second = len(dealt) // 4, len(dealt) - len(dealt) // 4
    return Parts(dealt[:first], dealt[first:second], dealt[second:])


def calibrate(
    model: TwoTower,
    questions: Sequence[Question],
    config: CalibrationConfig,
    *,
    prompts: str,
    fingerprint: str,
    advance: Callable[[str], None] = lambda what: None,
) -> Calibration:
    """A calibration of `model`, whose weights have this fingerprint, on questions that `prompts` describes.

    `advance` is called before each part with a line that says what it is. Raises ValueError for too few questions, or
    where `ar` scores nothing.
    """
    parts = deal(questions, config.seed)
    size = model.config.block_size
    params = SamplingParams(temperature=0.0, seed=0, block_size=size, past_positions=True)
    params = dataclasses.replace(params, steps_per_block=config.steps_per_block)
    advance(f"answers of ar to {len(parts.choose) + len(parts.held_out)} prompts")
    ar_params = dataclasses.replace(params, mode="ar")
    ar = {part: answer_questions(model, getattr(parts, part), ar_params) for part in ("choose", "held_out")}
    if not any(a.score for a in ar["choose"]):
        raise ValueError("ar scores 0 on these prompts, so there is nothing to keep; give prompts that it answers")
    advance(f"errors on {len(parts.fit)} prompts")
    watched = [dataclasses.replace(params, confidence_threshold=threshold) for threshold in _WATCHED]
    seen = [observe(model, parts.fit, w.settled(size, model.sampling)) for w in watched]
    errors = fit(seen[0].join(seen[1]), size)
    rules: list[CalibratedRule] = []
    shown = 1.0
    for risk in RISKS:
        advance(f"answers with a risk of {risk:g} a token")
        rule = CalibratedRule(
            risk=risk, thresholds=errors.thresholds(risk), shown=1.0, tokens_per_nfe=0.0, held_out=(None, None, None)
        )
        trial = copy.copy(model)  # the same weights, and another calibration
        calibration = Calibration(
            block_size=size,
            steps_per_block=config.steps_per_block,
            confidence=config.confidence,
            prompts=prompts,
            num_prompts=len(questions),
            fingerprint=fingerprint,
            rules=(rule,),
        )
        trial.calibration = calibration
        own = dataclasses.replace(params, target_retention=0.5)  # the only rule there is
        chosen = answer_questions(trial, parts.choose, own)
        scores, of_ar = ([a.score for a in answers] for answers in (chosen, ar["choose"]))
        shown = min(shown, kept_share(scores, of_ar, config.confidence))
        if shown < _LEAST_SHOWN:
            break
        rules.append(
            dataclasses.replace(
                rule,
                shown=shown,
                tokens_per_nfe=tokens_per_call(chosen)[0] or 0.0,
                held_out=retention(answer_questions(trial, parts.held_out, own), ar["held_out"]),
            )
        )
    return dataclasses.replace(calibration, rules=tuple(rules))
