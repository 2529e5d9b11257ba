"""How often calibrated rules keep what they were shown to keep: their choice, repeated on many draws of questions.

    python benchmarks/calibration_coverage.py CHECKPOINT TASK.jsonl … [--draws 500] [--choose 400] [--seed 0]

A quarter of the questions fits thresholds, as `twotower calibrate` does; all rules answer the others. Then a rule is
chosen for each target by `choose` of these, drawn at random, and what it keeps is measured on those not drawn.
Prints the figures of every rule on all questions, and for each target in which share of the draws a rule was found, in
which share of these it kept the target, and the means of what it kept and of its tokens per NFE.
"""

import argparse
import copy
import dataclasses
import json
import random
import statistics

import twotower
from twotower.eval.answering import ScoredAnswer, answer_questions, questions
from twotower.eval.calibration.bounds import kept_share
from twotower.eval.calibration.calibrate import RISKS
from twotower.eval.calibration.observations import observe
from twotower.eval.calibration.thresholds import fit
from twotower.eval.provenance import provenance
from twotower.eval.report import tokens_per_call
from twotower.eval.tasks import read_task
from twotower.model.calibration import CalibratedRule, Calibration

TARGETS = (0.9, 0.95, 0.97, 0.98, 0.99)
CONFIDENCE = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--draws", type=int, default=500, help="how often a rule is chosen")
    parser.add_argument("--choose", type=int, default=400, help="how many questions choose it")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    model = twotower.load(a.checkpoint)
    draw = random.Random(a.seed)
    asked = [question for task in a.tasks for question in questions(model, read_task(task))]
    draw.shuffle(asked)
    first, rest = asked[: len(asked) // 4], asked[len(asked) // 4 :]
    size = model.config.block_size
    params = twotower.SamplingParams(temperature=0.0, seed=0, block_size=size, past_positions=True)
    watched = [dataclasses.replace(params, confidence_threshold=t).settled(size, model.sampling) for t in (0.5, 0.95)]
    seen = [observe(model, first, w) for w in watched]
    errors = fit(seen[0].join(seen[1]), size)
    ar = answer_questions(model, rest, dataclasses.replace(params, mode="ar"))
    origin = {"fit": len(first), "answered": len(rest), "choose": a.choose, "draws": a.draws, **provenance(model)}
    print(json.dumps(origin), flush=True)
    rules: list[list[ScoredAnswer]] = []
    for risk in RISKS:
        rule = CalibratedRule(
            risk=risk,
            thresholds=errors.thresholds(risk),
            shown=1.0,
            tokens_per_nfe=0.0,
            held_out=(None, None, None),
        )
        trial = copy.copy(model)
        trial.calibration = Calibration(
            block_size=size,
            steps_per_block=params.steps_per_block,
            confidence=CONFIDENCE,
            prompts="",
            num_prompts=0,
            fingerprint="",
            rules=(rule,),
        )
        rules.append(answer_questions(trial, rest, dataclasses.replace(params, target_retention=0.5)))
        line = {"risk": risk, "kept": kept(rules[-1], ar), "tokens_per_nfe": tokens_per_call(rules[-1])[0]}
        print(json.dumps(line), flush=True)
    for line in coverage(rules, ar, draws=a.draws, choose=a.choose, draw=draw):
        print(json.dumps(line), flush=True)


def coverage(
    rules: list[list[ScoredAnswer]], ar: list[ScoredAnswer], *, draws: int, choose: int, draw: random.Random
) -> list[dict[str, float | int | None]]:
    """For each target what came of choosing a rule by `choose` of the answers, `draws` times."""
    found: dict[float, list[tuple[float, float]]] = {target: [] for target in TARGETS}
    for _ in range(draws):
        places = draw.sample(range(len(ar)), len(ar))
        chosen, other = places[:choose], places[choose:]
        shown, shares, speeds = 1.0, [], []
        for answers in rules:
            scores, of_ar = ([given[i].score for i in chosen] for given in (answers, ar))
            shown = min(shown, kept_share(scores, of_ar, CONFIDENCE))
            shares.append(shown)
            speeds.append(tokens_per_call([answers[i] for i in chosen])[0] or 0.0)
        for target in TARGETS:
            kept_it = [n for n, share in enumerate(shares) if share >= target]
            if kept_it:
                best = max(kept_it, key=lambda n: speeds[n])
                found[target].append((kept([rules[best][i] for i in other], [ar[i] for i in other]), speeds[best]))
    return [
        {
            "target": target,
            "promised": len(came) / draws,
            "kept_the_target": sum(share >= target for share, _ in came) / len(came) if came else None,
            "mean_kept": statistics.mean(share for share, _ in came) if came else None,
            "least_kept": min((share for share, _ in came), default=None),
            "mean_tokens_per_nfe": statistics.mean(speed for _, speed in came) if came else None,
        }
        for target, came in found.items()
    ]


def kept(answers: list[ScoredAnswer], ar: list[ScoredAnswer]) -> float:
    """The share of ar's score."""
    return sum(a.score for a in answers) / sum(a.score for a in ar)


if __name__ == "__main__":
    main()
