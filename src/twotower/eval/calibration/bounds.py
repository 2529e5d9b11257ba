"""Bounds on what is kept and lost that hold with a given chance, whatever the distribution of the scores is."""

import math
from collections.abc import Callable, Sequence

import numpy as np

# Shares of the capital that are bet at once, and how much of the capital begins with each: the first is best where
# nothing is lost, the last where much is lost and gained.
_BETS = {0.95: 0.3, 0.75: 0.15, 0.5: 0.15, 0.3: 0.1, 0.2: 0.1, 0.1: 0.1, 0.05: 0.06, 0.025: 0.04}


def kept_share(scores: Sequence[float], ar: Sequence[float], confidence: float) -> float:
    """A number that the expected score divided by the expected score of `ar` is not below, with a chance of at least
    `confidence`, given both scores, in [0, 1], of independent questions; at most 1.

    It is the larger of two bounds, each with half of the chance to fail. One counts losses alone and is tight where
    few answers differ: 1 − `upper_bound` of the shares of `ar`'s score that answers lack. The other counts gains too:
    who bets on every question at fair odds that more than the share t is kept, with a gain of score / t − `ar`'s score
    for each unit, multiplies their capital by 1 / p with a chance of at most p if that is false (Waudby-Smith and
    Ramdas 2020, "Estimating means of bounded random variables by betting"); so it is the largest t that capital
    refutes. `ar` scores above 0 somewhere.
    """
    each = (1 + confidence) / 2
    losses = [max(0.0, 1 - score / other) for score, other in zip(scores, ar, strict=True) if other > 0]
    mine, theirs = np.asarray(scores, dtype=float), np.asarray(ar, dtype=float)
    bets, weights = np.array(list(_BETS)), np.array(list(_BETS.values()))

    def refuted(share: float) -> bool:
        """Whether it is refuted that no more than this share is kept."""
        growth = np.log1p(bets[:, None] * (mine / share - theirs)).sum(-1) + np.log(weights)  # (bets,)
        return bool(np.logaddexp.reduce(growth) >= -math.log(1 - each))

    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return max(low, 1 - upper_bound(losses, each))


def upper_bound(losses: Sequence[float], confidence: float) -> float:
    """A number that the expected loss does not exceed with a chance of at least `confidence`, given independent losses
    in [0, 1]; 1 without any.

    Where all losses are 0 or 1 it is Clopper and Pearson's, which is exact. Else it is that of Hoeffding and Bentkus
    (Bates et al. 2021, "Distribution-free, risk-controlling prediction sets"), which Learn then Test uses.
    """
    n = len(losses)
    if n == 0:
        return 1.0
    assert all(0 <= loss <= 1 for loss in losses)
    total = math.fsum(losses)
    if all(loss in (0, 1) for loss in losses):
        return _largest(lambda mean: _at_most(round(total), n, mean), 1 - confidence, total / n)

    def chance(mean: float) -> float:
        """No less than the chance of a mean loss as low as the one seen, if `mean` is expected."""
        hoeffding = math.exp(-n * _divergence(min(total / n, mean), mean))
        # what sums of floats leave above a whole number is none
        return min(hoeffding, math.e * _at_most(math.ceil(total - 1e-9), n, mean))

    return _largest(chance, 1 - confidence, total / n)


def _largest(chance: Callable[[float], float], least: float, low: float) -> float:
    """The largest mean in [low, 1] whose `chance`, which falls as the mean grows, is above `least`: rounded up."""
    high = 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if chance(middle) > least:
            low = middle
        else:
            high = middle
    return high


def _at_most(count: int, n: int, p: float) -> float:
    """The chance of at most `count` successes in n trials with chance p, 0 < p <= 1."""
    if count >= n:
        return 1.0
    if p >= 1:
        return 0.0
    log_p, log_q = math.log(p), math.log1p(-p)
    ways = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(count + 1))
    return min(math.fsum(math.exp(way + k * log_p + (n - k) * log_q) for k, way in enumerate(ways)), 1.0)


def _divergence(a: float, b: float) -> float:
    """The Kullback-Leibler divergence of a coin with chance a from one with chance b, a <= b."""
    if a == b:
        return 0.0
    if b >= 1:
        return math.inf
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + (1 - a) * math.log((1 - a) / (1 - b))
