"""Measuring rows that are not trained on."""

from collections.abc import Callable
from typing import NamedTuple

from twotower.training.data import Batch, Corpus
from twotower.training.ranks import Ranks


class Measured(NamedTuple):
    """A sum of negative log-likelihoods in nats, and over how many tokens it goes."""

    nats: float
    tokens: float


def measure(
    corpus: Corpus, rows_at_once: int, ranks: Ranks, objective: Callable[[Batch], dict[str, Measured]]
) -> dict[str, float]:
    """Nats per token of all rows, by name. Each rank takes its share, in parts of `rows_at_once`; rows beyond a
    multiple of the ranks are left out, because all must take equally many parts. Raises ValueError for too few."""
    each = len(corpus) // ranks.size
    if each == 0:
        raise ValueError(f"the held-out corpus has {len(corpus)} rows, must have one for each of {ranks.size} ranks")
    sums: dict[str, list[float]] = {}
    for start in range(0, each, rows_at_once):
        first = ranks.rank * each
        batch = corpus.batch(range(first + start, first + min(start + rows_at_once, each)), 0)
        for name, (total, count) in objective(batch).items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0, 0.0]), (total, count), strict=True)]
    found = {}
    for name, values in sums.items():
        total, count = ranks.total(values)
        found[name] = total / max(count, 1)
    return found
