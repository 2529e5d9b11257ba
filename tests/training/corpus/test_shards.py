from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import save_file

from twotower.training.corpus.shards import Corpus, CorpusRows, write_shard


def arrays(rows: int = 4, length: int = 3) -> dict[str, np.ndarray]:
    ids = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    return {"ids": ids, "scored": ids % 2 == 0, "document": np.zeros_like(ids)}


def shard(folder: Path, name: str = "0.safetensors", **changes: Any) -> Path:
    save_file(arrays() | changes, folder / name)
    return folder / name


def test_shards_join_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, value, rows in (("b", 5, 2), ("a", 4, 1)):
        full = np.full((rows, 3), value)
        write_shard(tmp_path / f"{name}.safetensors", CorpusRows(full, full == 4, full * 0))
    (tmp_path / "c.partial.safetensors").write_bytes(b"half")
    corpus = Corpus(tmp_path, vocab_size=6)
    assert (len(corpus), corpus.length) == (3, 3)
    assert [corpus.row(i).ids.tolist() for i in range(3)] == [[4] * 3, [5] * 3, [5] * 3]
    assert [corpus.row(i).scored.tolist() for i in range(3)] == [[True] * 3, [False] * 3, [False] * 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": np.zeros(1)}, r"holds \['document', 'extra', 'ids', 'scored'\], must hold"),
        ({"ids": np.zeros((4, 3))}, r"holds {'ids': 'F64'}, must hold"),
        ({"scored": np.zeros((4, 3), np.int32)}, r"holds {'scored': 'I32'}, must hold"),
        ({"document": np.zeros((3, 3), np.int32)}, r"shapes \[\(3, 3\), \(4, 3\)\], must be \(rows, tokens\)"),
        (arrays(rows=0), r"shapes \[\(0, 3\)\], must be"),
    ],
)
def test_a_bad_shard_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    shard(tmp_path, "good.safetensors")
    bad = shard(tmp_path, "bad.safetensors", **changes)
    with pytest.raises(ValueError, match=message) as raised:
        Corpus(tmp_path, vocab_size=12)
    assert str(bad) in str(raised.value)


def test_tokens_outside_the_vocabulary_are_found_when_read(tmp_path: Path) -> None:
    shard(tmp_path)
    with pytest.raises(ValueError, match=r"0\.safetensors has ids outside \[0, 11\)"):
        Corpus(tmp_path, vocab_size=11).batch(range(4), seed=0)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_broken_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = shard(tmp_path)
    file.write_bytes(file.read_bytes()[:100] if content is None else content)
    with pytest.raises(ValueError, match=r"0\.safetensors is not a whole \.safetensors file .*; make it again"):
        Corpus(tmp_path, vocab_size=12)


def test_rows_of_two_lengths_and_no_rows_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none is no directory; make a corpus there with"):
        Corpus(tmp_path / "none", vocab_size=10)
    with pytest.raises(ValueError, match=r"holds no \.safetensors shard"):
        Corpus(tmp_path, vocab_size=12)
    shard(tmp_path, "a.safetensors")
    shard(tmp_path, "b.safetensors", **arrays(length=5))
    with pytest.raises(ValueError, match=r"rows of \[3, 5\] tokens, must all be of one length"):
        Corpus(tmp_path, vocab_size=30)


def test_an_epoch_visits_every_row_once_in_an_order_of_seed_and_epoch(tmp_path: Path) -> None:
    shard(tmp_path, "a.safetensors")
    shard(tmp_path, "b.safetensors")
    corpus = Corpus(tmp_path, vocab_size=12)
    first = corpus.batch(range(8), seed=1).ids
    assert sorted(first[:, 0].tolist()) == [0, 0, 3, 3, 6, 6, 9, 9]
    for other in (corpus.batch(range(8, 16), seed=1).ids, corpus.batch(range(8), seed=2).ids):
        assert sorted(other[:, 0].tolist()) == sorted(first[:, 0].tolist())
        assert not torch.equal(other, first)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_rows_do_not_depend_on_how_the_run_is_cut(size: int, tmp_path: Path) -> None:
    shard(tmp_path, "a.safetensors")
    corpus = Corpus(tmp_path, vocab_size=12)
    whole = corpus.batch(range(15), seed=1)  # nearly four epochs
    pieces = [corpus.batch(range(first, first + size), seed=1) for first in range(0, 15, size)]
    for field, expected in enumerate(whole):
        assert torch.equal(torch.cat([piece[field] for piece in pieces]), expected)
    assert whole.samples.tolist() == list(range(15))


def test_a_corpus_of_another_vocabulary_is_refused_and_one_that_says_none_is_taken(
    tmp_path: Path, byte_tokenizer: tokenizers.Tokenizer
) -> None:
    rows = CorpusRows(**arrays())
    other = tokenizers.Tokenizer.from_str(byte_tokenizer.to_str().replace('"a"', '"A?"'))
    write_shard(shard(tmp_path, "old.safetensors"), rows)
    write_shard(tmp_path / "same.safetensors", rows, byte_tokenizer)
    assert len(Corpus(tmp_path, vocab_size=260, tokenizer=byte_tokenizer)) == 8
    write_shard(tmp_path / "wrong.safetensors", rows, other)
    words = r"wrong\.safetensors was made with another vocabulary .*: token 101 is 'A\?' there and 'a' here"
    with pytest.raises(ValueError, match=words):
        Corpus(tmp_path, vocab_size=260, tokenizer=byte_tokenizer)
    assert len(Corpus(tmp_path, vocab_size=260)) == 12


def test_a_vocabulary_that_cant_be_read_is_named(tmp_path: Path) -> None:
    for text in ("[1]", "{", '{"a": "b"}'):
        save_file(arrays(), tmp_path / "bad.safetensors", {"vocabulary": text})
        with pytest.raises(ValueError, match=r"bad\.safetensors has a vocabulary that can't be read"):
            Corpus(tmp_path, vocab_size=12)
