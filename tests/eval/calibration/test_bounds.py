"""Bounds that hold with the chance that they name."""

import numpy as np
import pytest

from twotower.eval.calibration.bounds import kept_share, upper_bound


@pytest.mark.parametrize(
    ("wrong", "n", "expected"),
    # Clopper and Pearson's, from tables: 1 - 0.1 ** (1 / n) where nothing is wrong
    [(0, 230, 1 - 0.1 ** (1 / 230)), (0, 1, 0.9), (5, 1000, 0.00925), (1, 20, 0.1810), (20, 20, 1.0)],
)
def test_bounds_of_proportions_are_exact(wrong: int, n: int, expected: float) -> None:
    assert upper_bound([1.0] * wrong + [0.0] * (n - wrong), 0.9) == pytest.approx(expected, rel=2e-3)


def test_nothing_seen_bounds_nothing() -> None:
    assert upper_bound([], 0.9) == 1.0


def test_a_bound_of_shares_lies_above_their_mean_and_comes_closer() -> None:
    few, many = ([0.1, 0.3, 0.2, 0.0] * n for n in (10, 1000))
    assert 0.15 < upper_bound(many, 0.9) < 0.17 < upper_bound(few, 0.9) < 0.3
    assert upper_bound(few, 0.99) > upper_bound(few, 0.9)


@pytest.mark.parametrize("kind", ["proportion", "shares"])
def test_the_expected_loss_exceeds_a_bound_as_rarely_as_promised(kind: str) -> None:
    """4,000 samples of 80 losses: 10 % of them may fail, and 4 standard deviations are 1.9 %."""
    draw = np.random.default_rng(0)
    mean = 0.07
    failed = 0
    for _ in range(4000 if kind == "proportion" else 400):
        losses = draw.random(80) < mean if kind == "proportion" else draw.beta(0.2, 0.2 / mean - 0.2, 80)
        failed += upper_bound([float(loss) for loss in losses], 0.9) < mean
    assert failed <= (4000 * 0.119 if kind == "proportion" else 400 * 0.16)


def test_what_is_kept_where_nothing_is_lost_depends_on_the_number_alone() -> None:
    assert kept_share([1.0] * 300, [1.0] * 300, 0.9) == pytest.approx(0.05 ** (1 / 300), abs=1e-5)
    assert kept_share([1.0] * 300 + [0.0] * 50, [1.0] * 300 + [0.0] * 50, 0.9) == pytest.approx(0.99, abs=1e-3)


def test_gains_make_up_for_losses() -> None:
    ar = [1.0] * 960 + [0.0] * 40
    lossy = [0.0] * 20 + [1.0] * 940 + [0.0] * 40
    level = [0.0] * 20 + [1.0] * 960 + [0.0] * 20
    assert kept_share(lossy, ar, 0.9) < 0.97 < kept_share(level, ar, 0.9) < 1


def test_nobody_is_shown_to_keep_more_than_all() -> None:
    assert kept_share([1.0] * 500, [0.5] * 500, 0.9) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["right or wrong", "shares"])
def test_less_than_what_is_shown_is_kept_as_rarely_as_promised(kind: str) -> None:
    """400 samples of 150 questions: 10 % of them may fail, and 4 standard deviations are 6 %."""
    draw = np.random.default_rng(1)
    shown = []
    for _ in range(400):
        if kind == "shares":
            ar = draw.uniform(0.2, 0.8, 150)
            mine = np.clip(ar * draw.normal(0.9, 0.2, 150), 0, 1)
        else:
            ar = (draw.random(150) < 0.9).astype(float)
            mine = np.where(draw.random(150) < 0.08, 1 - ar, ar)
        shown.append(kept_share(mine.tolist(), ar.tolist(), 0.9))
    kept = 0.9 if kind == "shares" else (0.9 * 0.92 + 0.1 * 0.08) / 0.9
    assert np.mean(np.array(shown) > kept) <= 0.16
    assert np.mean(shown) > kept - 0.12  # else it would say nothing
