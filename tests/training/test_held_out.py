from pathlib import Path

import numpy as np
import pytest

from twotower.training.data import Batch, Corpus, Rows, write_shard
from twotower.training.held_out import Measured, measure
from twotower.training.ranks import Ranks


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    ids = np.arange(35).reshape(7, 5)
    write_shard(tmp_path / "0.safetensors", Rows(ids, np.ones_like(ids), ids * 0))
    return Corpus(tmp_path, vocab_size=40)


@pytest.mark.parametrize("at_once", [1, 2, 7, 100])
def test_every_row_counts_once(at_once: int, corpus: Corpus) -> None:
    seen: list[int] = []

    def objective(batch: Batch) -> dict[str, Measured]:
        seen.extend(batch.ids[:, 0].tolist())
        return {"first": Measured(float(batch.ids[:, 0].sum()), len(batch.ids)), "none": Measured(0.0, 0.0)}

    assert measure(corpus, at_once, Ranks(), objective) == {"first": 15.0, "none": 0.0}
    assert sorted(seen) == [0, 5, 10, 15, 20, 25, 30]


def test_fewer_rows_than_ranks_raise(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="has 7 rows, must have one for each of 8 ranks"):
        measure(corpus, 1, Ranks(0, 8), lambda batch: {})
