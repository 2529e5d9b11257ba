"""What share of `ar`'s score a mode keeps on a task, and on several, with 95 % intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from twotower.eval.answering import ScoredAnswer, mean_score

_RESAMPLES = 2000
# The interval is undefined if ar scores 0 in more than this share of the resamples.
_UNDEFINED_SHARE = 0.01
# A task is left out of means if the standard error of ar's score is a larger share of that score.
_MOST_UNCERTAIN = 0.25


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


def not_counted(ar: Sequence[ScoredAnswer]) -> str | None:
    """Why a task is left out of means over tasks, given ar's answers; None if it counts.

    A share of a score means little if that score is uncertain itself: its standard error must be at most a quarter of
    it. ar must get 12 of 40 questions right, 16 of any larger number, and all of a few.
    """
    mean = mean_score(ar)
    if mean == 0:
        return "ar scores 0"
    error = statistics.pstdev(a.score for a in ar) / math.sqrt(len(ar)) / mean
    if error <= _MOST_UNCERTAIN:
        return None
    return f"ar scores {mean:.3f} with a standard error of {error:.0%} of that, more than {_MOST_UNCERTAIN:.0%}"


def retention(mode: Sequence[ScoredAnswer], ar: Sequence[ScoredAnswer], *, exact: bool = False) -> Interval:
    """score(mode)/score(ar) on one task, whose examples both answer in the same order; undefined where ar scores 0.

    The interval is made by a percentile bootstrap over the examples:

    - The mode's and ar's scores on an example are always drawn together.
    - It is undefined if ar scores 0 in more than 1 % of the resamples.
    - If all scores are 0 or 1, two pseudo-pairs are added, both right for ar and one of them for the mode (Agresti and
      Coull 1998, for a proportion). Without them 48 right answers of 48 would pass for certainty, and the intervals of
      a mode that keeps 98 % would cover that in 6 of 10 cases.
    - If ar is also wrong somewhere, a third pseudo-pair is right for the mode alone, because the mode may gain answers
      as well as lose them. Without it the mean over four tasks would leave out 100 % in 1 of 8 cases.
    - For other scores the ends move outward as those of a t-interval lie outside of a normal one. Without that the
      intervals of 8 stories would cover the truth in 85 of 100 cases.

    `exact` says that the mode writes ar's texts by construction. If the answers show no difference either, the interval
    has no width.
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
    draw = np.random.default_rng(0)  # so that the same answers always have the same interval
    means = pairs[draw.integers(len(pairs), size=(_RESAMPLES, len(pairs)))].mean(axis=1)  # (resamples, 2)
    defined = means[:, 1] > 0
    if stretch is None or (~defined).mean() > _UNDEFINED_SHARE:
        return Interval(value, None, None)
    low, high = np.quantile(means[defined, 0] / means[defined, 1], (0.025, 0.975))
    return Interval(value, float(value + stretch * (low - value)), float(value + stretch * (high - value)))


def _stretch(n: int) -> float | None:
    """How many times as wide as the bootstrap's a 95 % t-interval for a mean of n values is; None for one value.

    The bootstrap takes the spread of the sample for the true one, and divides by n where n - 1 is right. Student's t
    comes from its expansion in 1/(n - 1).
    """
    if n < 2:
        return None
    z, v = statistics.NormalDist().inv_cdf(0.975), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v * v)
    return math.sqrt(n / v) * t / z


def mean_retention(shares: Sequence[Interval]) -> Interval:
    """The mean of the retentions of independent tasks; undefined if there are none or one of them is undefined.

    Each end of the interval is as far from the mean as the square root of the sum of the squared distances that the
    tasks' own ends contribute (Zou and Donner 2008). Pooled resamples would add up the bias that `retention`'s
    pseudo-pairs give every task, and for four tasks at 100 % the interval would not contain 100 %.
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
