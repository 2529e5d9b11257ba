"""Answers of the decoding modes to a task, their scores, and what share of `ar`'s quality a mode keeps."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from twotower.decoding.generate import generate
from twotower.decoding.output import Generation, GenerationStats
from twotower.decoding.params import SamplingParams
from twotower.eval.scoring import is_degenerate, score_text
from twotower.eval.tasks import Example, Task, prompt_ids
from twotower.model.two_tower import TwoTower

# Questions of similar length are answered as one batch, up to so many of them and so many tokens of prompts with their
# padding; every answer is what its question would get alone.
_MOST_ROWS, _MOST_TOKENS = 8, 8192
_RESAMPLES = 2000
# An interval that leaves out more than this share of the resamples would not be one.
_UNDEFINED_SHARE = 0.01
# A share of a score that is uncertain by more than this says more of ar's luck than of the mode.
_MOST_UNCERTAIN = 0.25


class Answer(NamedTuple):
    """A mode's reply to one example: its score in [0, 1], what it cost, and at which step each token was committed."""

    text: str
    score: float
    degenerate: bool
    stats: GenerationStats
    commit_steps: list[int]


class Interval(NamedTuple):
    """A value with its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


def request(example: Example, params: SamplingParams, index: int) -> SamplingParams:
    """The settings of a task's example number `index`: its own length and stop strings, and a seed of its own."""
    assert params.seed is not None
    return dataclasses.replace(
        params, max_new_tokens=example.max_new_tokens, stop=example.stop, seed=params.seed + index
    )


def answer(model: TwoTower, task: Task, params: SamplingParams) -> list[Answer]:
    """Answers every example of a task with one set of params, whose seed must be set. Needs a tokenizer."""
    if model.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json to read tasks with; add one")
    prompts = [prompt_ids(example, model.tokenizer) for example in task.examples]
    settings = [request(example, params, i) for i, example in enumerate(task.examples)]
    answers: dict[int, Answer] = {}
    for batch in _batches([len(prompt) for prompt in prompts]):
        replies = generate(model, [prompts[i] for i in batch], [settings[i] for i in batch])
        answers |= {
            i: _judge(model, task.examples[i], prompts[i], done) for i, done in zip(batch, replies, strict=True)
        }
    return [answers[i] for i in range(len(prompts))]


def _batches(lengths: list[int]) -> list[list[int]]:
    """Places of the prompts, shortest first, in batches."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and len(batches[-1]) < _MOST_ROWS and (len(batches[-1]) + 1) * lengths[i] <= _MOST_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _judge(model: TwoTower, example: Example, prompt: list[int], done: Generation) -> Answer:
    assert done.text is not None
    score = (
        likelihood_score(model, prompt, done.token_ids, done.text)
        if example.scorer == "likelihood"
        else score_text(example, done.text)
    )
    return Answer(done.text, score, is_degenerate(done.text), done.stats, done.commit_steps)


def likelihood_score(model: TwoTower, prompt: Sequence[int], new: Sequence[int], text: str) -> float:
    """exp(mean log p) of the new tokens under the context tower, 0 for a degenerate or empty text.

    That is the probability per token, so that a mode's share of `ar`'s is exp of minus the nats per token it loses.
    """
    if is_degenerate(text) or not text.strip():
        return 0.0
    return float(np.exp(log_probabilities(model, prompt, new).mean().item()))


def log_probabilities(model: TwoTower, prompt: Sequence[int], new: Sequence[int]) -> torch.Tensor:
    """Log-probability of each of `new` after the tokens before it under the context tower, (len(new),) float32."""
    ids = torch.tensor([[*prompt, *new]])
    logits = model.context_logits(ids)[0, len(prompt) - 1 : -1].cpu()
    return -F.cross_entropy(logits, ids[0, len(prompt) :], reduction="none")


def mean_score(answers: Sequence[Answer]) -> float:
    return statistics.mean(a.score for a in answers)


def not_counted(ar: Sequence[Answer]) -> str | None:
    """Why a task is left out of means over tasks; None where it isn't.

    A share needs something to be a share of: the standard error of ar's mean score must be at most a quarter of it. Of
    40 questions ar must get 12 right, of as many as one likes 16, and all of them of a few.
    """
    mean = mean_score(ar)
    if mean == 0:
        return "ar scores 0"
    error = statistics.pstdev(a.score for a in ar) / math.sqrt(len(ar)) / mean
    if error <= _MOST_UNCERTAIN:
        return None
    return f"ar scores {mean:.3f} with a standard error of {error:.0%} of that, more than {_MOST_UNCERTAIN:.0%}"


def retention(mode: Sequence[Answer], ar: Sequence[Answer], *, exact: bool = False) -> Interval:
    """score(mode)/score(ar) on one task, whose examples both answer in the same order; undefined where ar scores 0.

    The interval is a percentile bootstrap over the examples, a mode's and ar's answers to one example always drawn
    together, and undefined where in more than 1 % of the resamples ar scores nothing. Scores that are all 0 or 1 are
    resampled with two more pairs, both right for ar and one for the mode (as Agresti and Coull 1998 do for a share): 48
    right answers of 48 would pass for certainty, and 98 % be covered in 6 of 10 cases. Where ar is ever wrong, a third
    one is right for the mode alone, as it may gain answers as well as lose them: else means over four tasks would leave
    out 100 % in 1 of 8 cases. Of other scores the ends move out as a t-interval's lie outside of a normal one's: else 8
    stories would cover the truth in 85 of 100 cases. `exact` says that the mode writes what ar writes by its
    construction; where the answers show no difference either, the interval has no width.
    """
    pairs = np.array([(m.score, a.score) for m, a in zip(mode, ar, strict=True)])  # (n, 2)
    if pairs[:, 1].mean() == 0:
        return Interval(None, None, None)
    if exact and all((m.text, m.score) == (a.text, a.score) for m, a in zip(mode, ar, strict=True)):
        return Interval(1.0, 1.0, 1.0)
    value = float(pairs[:, 0].mean() / pairs[:, 1].mean())
    stretch = _stretch(len(pairs))
    if np.isin(pairs, (0, 1)).all():
        gained = [] if pairs[:, 1].all() else [(1, 0)]
        pairs = np.concatenate([pairs, [(0, 1), (1, 1), *gained]])
        stretch = 1.0
    draw = np.random.default_rng(0)  # the same answers have the same interval
    means = pairs[draw.integers(len(pairs), size=(_RESAMPLES, len(pairs)))].mean(axis=1)  # (resamples, 2)
    defined = means[:, 1] > 0
    if stretch is None or (~defined).mean() > _UNDEFINED_SHARE:
        return Interval(value, None, None)
    low, high = np.quantile(means[defined, 0] / means[defined, 1], (0.025, 0.975))
    return Interval(value, float(value + stretch * (low - value)), float(value + stretch * (high - value)))


def _stretch(n: int) -> float | None:
    """How much wider a 95 % interval for a mean of n values is than the bootstrap's: it takes their spread for the
    truth's, and by n instead of n - 1. Student's t by its expansion in 1/(n - 1); None where one value says nothing."""
    if n < 2:
        return None
    z, v = statistics.NormalDist().inv_cdf(0.975), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v * v)
    return math.sqrt(n / v) * t / z


def mean_retention(shares: Sequence[Interval]) -> Interval:
    """The mean of independent tasks' retentions, undefined where there is none or one of them is.

    The interval's ends lie as far from the mean as the root of the sum of the squares of what each task's own end
    contributes (Zou and Donner 2008): pooled resamples would add up the shift that `retention`'s pairs give every
    task, and with four tasks at 100 % leave out 100 %.
    """
    values = [share.value for share in shares if share.value is not None]
    if not values or len(values) < len(shares):
        return Interval(None, None, None)
    value = statistics.mean(values)
    lows = [share.low for share in shares if share.low is not None]
    highs = [share.high for share in shares if share.high is not None]
    if len(lows) < len(shares) or len(highs) < len(shares):
        return Interval(value, None, None)
    below = math.dist(values, lows) / len(values)
    above = math.dist(values, highs) / len(values)
    return Interval(value, value - below, value + above)
