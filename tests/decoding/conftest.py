"""A test of what was drawn at random."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch


class Fit(NamedTuple):
    """A chi-square test's p-value and degrees of freedom."""

    p_value: float
    degrees: int


@pytest.fixture(scope="session")
def chi_square() -> Callable[[Counter, dict[Any, float], int], Fit]:
    """chi_square(counts, expected, num) tests counts of `num` draws against the probabilities that are expected."""

    def check(counts: Counter, expected: dict[Any, float], num: int) -> Fit:
        # cells that expect fewer than 5 are one cell
        large = {k: e * num for k, e in expected.items() if e * num >= 5}
        cells = [(counts[k], e) for k, e in large.items()]
        rest = num - sum(large.values())
        if rest > 1e-6 * num:
            cells.append((num - sum(c for c, _ in cells), rest))
        statistic = sum((c - e) ** 2 / e for c, e in cells)
        half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
        return Fit(torch.special.gammaincc(half[0], half[1]).item(), len(cells) - 1)

    return check
