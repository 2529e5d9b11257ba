"""Thresholds from observations whose law is known."""

import itertools

import numpy as np
import pytest

from twotower.eval.calibration.observations import Observations
from twotower.eval.calibration.thresholds import fit

SIZE = 4


def seen(n: int, slope: float = 1.0) -> Observations:
    """Proposals that are right with log-odds slope · log-odds(p) + 1 at place 0 and − 1 at place 1."""
    draw = np.random.default_rng(0)
    p = draw.uniform(0.02, 0.98, n).astype(np.float32)
    place, masked = draw.integers(0, SIZE, n), draw.integers(1, SIZE + 1, n)
    shift = np.array([1.0, -1.0, 0.0, 0.0])[place]
    right = draw.random(n) < 1 / (1 + np.exp(-slope * np.log(p / (1 - p)) - shift))
    return Observations(p, place, masked, ~right)


def test_thresholds_are_where_the_chance_of_an_error_is_the_risk() -> None:
    table = np.array(fit(seen(200_000), SIZE).thresholds(0.1))
    assert table.shape == (SIZE, SIZE)
    exact = 1 / (1 + np.exp(-(np.log(9) - np.array([1.0, -1.0, 0.0, 0.0]))))
    assert table.mean(0) == pytest.approx(exact, abs=0.01)
    assert np.abs(table - table.mean(0)).max() < 0.02  # the number of masks says nothing here


def test_a_smaller_risk_has_higher_thresholds_everywhere() -> None:
    errors = fit(seen(2000), SIZE)
    tables = [np.array(errors.thresholds(risk)) for risk in (0.4, 0.1, 0.01, 0.0005)]
    assert all((low < high).all() for low, high in itertools.pairwise(tables))
    assert all(0 <= table.min() <= table.max() <= 1 for table in tables)


def test_without_observations_a_proposal_is_as_likely_wrong_as_the_denoiser_thinks() -> None:
    none = seen(0)
    assert np.array(fit(none, SIZE).thresholds(0.25)) == pytest.approx(0.75)


def test_where_all_was_right_thresholds_are_numbers() -> None:
    sure = seen(500)._replace(wrong=np.zeros(500, bool))
    assert np.isfinite(np.array(fit(sure, SIZE).thresholds(0.01))).all()


def test_probabilities_that_say_the_contrary_are_refused() -> None:
    with pytest.raises(ValueError, match="train it further"):
        fit(seen(5000, slope=-1.0), SIZE)
