from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.training.data import Corpus


def shard(folder: Path, name: str = "0.npz", **arrays: Any) -> Path:
    np.savez(folder / name, **({"ids": np.arange(12).reshape(4, 3), "prefix": np.array([0, 1, 2, 3])} | arrays))
    return folder / name


def test_shards_join_in_the_order_of_their_names(tmp_path: Path) -> None:
    shard(tmp_path, "b.npz", ids=np.full((2, 3), 5, np.int32), prefix=np.array([1, 1], np.int32))
    shard(tmp_path, "a.npz", ids=np.full((1, 3), 4, np.int16), prefix=np.array([2], np.int16))
    (tmp_path / "c.partial.npz").write_bytes(b"half")
    corpus = Corpus.load(tmp_path, vocab_size=6)
    assert corpus.ids.tolist() == [[4] * 3, [5] * 3, [5] * 3]
    assert corpus.prefix.tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"extra": np.zeros(1)}, r"holds \['extra', 'ids', 'prefix'\], must hold ids and prefix"),
        ({"ids": np.array([[0, 12]] * 4)}, r"ids outside \[0, 12\)"),
        ({"ids": np.array([[0, -1]] * 4)}, r"ids outside \[0, 12\)"),
        ({"ids": np.zeros((4, 3))}, "float64 ids and int64 prefixes, must be integers"),
        ({"prefix": np.zeros(4)}, "int64 ids and float64 prefixes, must be integers"),
        ({"ids": np.zeros(4, int)}, r"ids \(4,\) and prefix \(4,\), must be \(r, t\) and \(r,\)"),
        ({"prefix": np.zeros(3, int)}, r"ids \(4, 3\) and prefix \(3,\), must be"),
        ({"ids": np.zeros((0, 3), int), "prefix": np.zeros(0, int)}, r"ids \(0, 3\) and prefix \(0,\), must be"),
        ({"ids": np.array([[None]] * 4)}, "is not a whole .npz file"),
    ],
)
def test_a_bad_shard_is_named(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    shard(tmp_path, "good.npz")
    bad = shard(tmp_path, "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as raised:
        Corpus.load(tmp_path, vocab_size=12)
    assert str(bad) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_broken_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = shard(tmp_path)
    file.write_bytes(file.read_bytes()[:100] if content is None else content)
    with pytest.raises(ValueError, match=r"0\.npz is not a whole \.npz file .*; sample it again"):
        Corpus.load(tmp_path, vocab_size=12)


def test_rows_of_two_lengths_and_no_rows_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.npz shard"):
        Corpus.load(tmp_path, vocab_size=12)
    shard(tmp_path, "a.npz")
    shard(tmp_path, "b.npz", ids=np.zeros((4, 5), int))
    with pytest.raises(ValueError, match=r"rows of \[3, 5\] tokens, must all be of one length"):
        Corpus.load(tmp_path, vocab_size=12)


def corpus(rows: int = 10) -> Corpus:
    return Corpus(np.arange(rows)[:, None].repeat(4, 1), np.arange(rows) % 5)


def test_a_batch_has_whole_rows_and_scores_what_follows_the_prefix() -> None:
    x0, scored = corpus().batch(0, 4, seed=0)
    assert x0.shape == scored.shape == (4, 4)
    for row, flags in zip(x0.tolist(), scored.tolist(), strict=True):
        assert len(set(row)) == 1
        assert flags == [place >= row[0] % 5 for place in range(4)]


@pytest.mark.parametrize("size", [1, 3, 5, 10])
def test_an_epoch_sees_every_row_at_most_once_and_epochs_differ(size: int) -> None:
    c, per_epoch = corpus(), 10 // size
    epochs = [
        [int(row) for step in range(per_epoch) for row in c.batch(e * per_epoch + step, size, seed=0)[0][:, 0]]
        for e in range(3)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == per_epoch * size
    assert len({tuple(e) for e in epochs}) == 3


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first = corpus().batch(7, 3, seed=1)[0]
    for step in range(7):
        corpus().batch(step, 3, seed=1)
    assert first.equal(corpus().batch(7, 3, seed=1)[0])
    assert not first.equal(corpus().batch(7, 3, seed=2)[0])


def test_a_batch_larger_than_the_corpus_raises() -> None:
    with pytest.raises(ValueError, match="batch size 11 exceeds the corpus of 10 rows; lower it"):
        corpus().batch(0, 11, seed=0)
