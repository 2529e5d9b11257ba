"""benchmarks/calibration_coverage.py on answers whose losses are known."""

import random
import runpy
from pathlib import Path

from twotower.decoding.output import GenerationStats
from twotower.eval.answering import ScoredAnswer


def answers(wrong: float, nfes: int) -> list[ScoredAnswer]:
    draw = random.Random(nfes)
    stats = GenerationStats(
        denoiser_calls=nfes, context_calls=2, seconds_to_first_token=0.1, seconds_total=0.2, num_tokens=8
    )
    return [ScoredAnswer("a", float(draw.random() >= wrong), False, stats, ()) for _ in range(1200)]


def test_a_rule_is_promised_as_often_as_it_can_be_shown_to_keep_the_target():
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "calibration_coverage.py"))
    rules = [answers(0.0, 8), answers(0.04, 4), answers(0.3, 2)]
    found = script["coverage"](rules, answers(0.0, 1), draws=40, choose=400, draw=random.Random(0))
    by_target = {line["target"]: line for line in found}
    safe, middle = by_target[0.99], by_target[0.9]
    assert (safe["promised"], safe["kept_the_target"], safe["mean_tokens_per_nfe"]) == (1.0, 1.0, 1.0)
    assert (middle["promised"], middle["kept_the_target"], middle["mean_tokens_per_nfe"]) == (1.0, 1.0, 2.0)
    assert 0.94 < middle["mean_kept"] < 0.98
    assert all(line["kept_the_target"] >= 0.8 for line in found)
