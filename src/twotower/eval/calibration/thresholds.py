"""From observations to thresholds. Letters: n observations, S places of a block, f features."""

import numpy as np

from twotower.eval.calibration.observations import Observations

# Probabilities are taken for at least this far from 0 and 1: float32 has few numbers there.
_EDGE = 1e-6
# Strength of the prior, as so many observations: places and numbers of masks are alike, and a proposal is as likely
# wrong as the denoiser thinks.
_PRIOR = 10.0


class ErrorModel:
    """How likely a proposal is to be wrong: logistic in the log-odds of its probability, with an offset for its place
    and one for the number of masks.

        log-odds(right) = a + b · log-odds(p) + u[place] + v[masks]
    """

    def __init__(self, block_size: int, weights: np.ndarray) -> None:
        self.block_size = block_size
        self._weights = weights

    def thresholds(self, risk: float) -> tuple[tuple[float, ...], ...]:
        """The probabilities above which a proposal is wrong with a chance below `risk`, (S, S): by the number of masks
        less one, and by place."""
        a, b, *offsets = self._weights
        places, masks = np.split(np.array(offsets), 2)
        odds = (np.log1p(-risk) - np.log(risk) - a - places[None] - masks[:, None]) / b
        return tuple(tuple(float(t) for t in row) for row in np.round(1 / (1 + np.exp(-odds)), 6))


def fit(seen: Observations, block_size: int) -> ErrorModel:
    """The most likely model of the observations, by Newton's method. Raises ValueError where probabilities say nothing
    about what is right."""
    features = _features(seen, block_size)  # (n, f)
    right = (~seen.wrong).astype(float)
    prior = np.zeros(features.shape[1])
    prior[1] = 1.0
    strength = np.full(len(prior), _PRIOR)
    strength[0] = 1e-3
    weights = prior.copy()
    for _ in range(50):
        p = 1 / (1 + np.exp(-features @ weights))
        slope = features.T @ (right - p) - strength * (weights - prior)
        curve = (features * (p * (1 - p))[:, None]).T @ features + np.diag(strength)
        step = np.linalg.solve(curve, slope)
        # far from the most likely weights a whole step may overshoot
        weights = weights + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    if weights[1] <= 0:
        raise ValueError(
            f"the surer this denoiser is, the more often it is wrong, at {len(right)} tokens that were looked at, so "
            "no threshold helps; train it further"
        )
    return ErrorModel(block_size, weights)


def _features(seen: Observations, block_size: int) -> np.ndarray:
    p = np.clip(seen.probability.astype(float), _EDGE, 1 - _EDGE)
    table = np.zeros((len(p), 2 + 2 * block_size))
    table[:, 0] = 1
    table[:, 1] = np.log(p) - np.log1p(-p)
    rows = np.arange(len(p))
    table[rows, 2 + seen.place] = 1
    table[rows, 1 + block_size + seen.masked] = 1
    return table
