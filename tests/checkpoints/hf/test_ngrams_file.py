from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import twotower
from twotower.checkpoints.hf import save
from twotower.checkpoints.hf.ngrams_file import NGRAMS_FILE, ngrams_bytes, read_ngrams, write_ngrams
from twotower.model.ngrams import NgramTable
from twotower.model.two_tower import TwoTower


def table(vocab_size: int = 40) -> NgramTable:
    keys = np.array([3, 9, 1 << 31], np.uint32)
    return NgramTable(3, vocab_size, keys, np.array([1, 0, 7], np.uint16), np.array([255, 3, 9], np.uint8))


@pytest.fixture
def folder(tiny: Callable[..., TwoTower], tmp_path: Path) -> Path:
    save(tiny("llama"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def same(ours: NgramTable, theirs: NgramTable) -> bool:
    arrays = ((getattr(ours, n), getattr(theirs, n)) for n in ("keys", "tokens", "shares"))
    return ours.order == theirs.order and all(a.dtype == b.dtype and (a == b).all() for a, b in arrays)


def test_a_checkpoint_has_its_ngrams_and_keeps_them(folder: Path, tmp_path: Path) -> None:
    assert twotower.load(folder).ngrams is None
    write_ngrams(folder, table(), None)
    (folder / "generation_config.json").write_text('{"drafter": "prompt,ngram"}')
    model = twotower.load(folder, pack=False)
    assert model.ngrams is not None
    assert same(model.ngrams, table())
    assert model.sampling.drafter == "prompt,ngram"
    twotower.save(model, tmp_path / "again")
    assert (tmp_path / "again" / NGRAMS_FILE).read_bytes() == (folder / NGRAMS_FILE).read_bytes()
    model.documents = {}  # whoever says that there are no others
    twotower.save(model, tmp_path / "again")
    assert not (tmp_path / "again" / NGRAMS_FILE).exists()


def test_without_its_file_a_checkpoint_drafts_with_the_denoiser_and_says_so(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"drafter": "prompt,ngram"}')
    with pytest.warns(UserWarning, match="has lost its ngrams.npz"):
        assert twotower.load(folder).sampling.drafter is None
    (folder / "generation_config.json").write_text('{"drafter": 3}')
    with pytest.raises(ValueError, match="drafter 3, must be a text"):
        twotower.load(folder)


def test_a_file_of_other_bytes_is_refused_without_advice_to_load_it_unsafely(folder: Path) -> None:
    for content in (b"", b"bytes of something else", b"\x93NUMPY"):
        (folder / NGRAMS_FILE).write_bytes(content)
        with pytest.raises(ValueError, match=r"is no file of n-grams \(no archive of NumPy's\); make it again"):
            twotower.load(folder)


def changed(**values: object) -> dict[str, object]:
    arrays = {"version": 1, "order": 3, "vocab_size": 40, "vocabulary": "", "keys": np.array([1, 2], np.uint32)}
    return arrays | {"tokens": np.array([1, 2], np.uint16), "shares": np.array([1, 2], np.uint8)} | values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"version": 2}, "has version 2, must be 1"),
        ({"vocab_size": 41}, "another vocabulary"),
        ({"vocabulary": "abc"}, "another vocabulary"),
        ({"keys": np.array([2, 1], np.uint32)}, "out of order"),
        ({"tokens": np.array([1, 40], np.uint16)}, "beyond the vocabulary"),
        ({"tokens": np.array([1], np.uint16)}, "other shapes or types"),
        ({"shares": np.array([0.5, 1.0])}, "other shapes or types"),
        ({"order": 1}, "other shapes or types"),
        ({"order": "many"}, "is no file of n-grams"),
        ({"keys": np.array([object()])}, "is no file of n-grams"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(values: dict[str, object], words: str, folder: Path) -> None:
    np.savez(folder / NGRAMS_FILE, **changed())  # type: ignore[arg-type]
    assert twotower.load(folder).ngrams is not None
    np.savez(folder / NGRAMS_FILE, **changed(**values))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        twotower.load(folder)


def test_a_broken_file_is_refused(folder: Path, tiny: Callable[..., TwoTower]) -> None:
    content = ngrams_bytes(table(), None)
    assert content == ngrams_bytes(table(), None)
    config = tiny("llama").config
    for broken in (b"", b"no archive", content[: len(content) // 2], content.replace(b"keys", b"kees")):
        (folder / NGRAMS_FILE).write_bytes(broken)
        with pytest.raises(ValueError, match=r"is no file of n-grams.*twotower ngrams"):
            read_ngrams(folder, config, None)
