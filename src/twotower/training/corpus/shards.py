"""Token corpora on disk: safetensors shards of rows, read through memory maps. Letters: r rows, b batch, t tokens.

A shard holds three arrays: `ids` (r, t) int32; `scored` (r, t) bool, False for positions that are never masked or
learnt (prompts, prefixes, BOS, padding); and `document` (r, t) int32, which numbers the documents of a row,
non-decreasing. Its metadata has `vocabulary`, how some tokens are spelled by their ids, as JSON; older shards have
none.
"""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from twotower.training.corpus.spellings import difference, spellings

_VOCABULARY = "vocabulary"
_DTYPES = {"ids": "I32", "scored": "BOOL", "document": "I32"}


class CorpusBatch(NamedTuple):
    """Rows as tensors: `ids` (b, t) int64, `scored` (b, t) bool, `document` (b, t) int64. `samples` (b,) int64 are the
    rows' numbers in an endless run over the corpus, on which their noise depends."""

    ids: Tensor
    scored: Tensor
    document: Tensor
    samples: Tensor


class CorpusRows(NamedTuple):
    """The arrays of a shard (r, t), or of one of its rows (t,), in the stored dtypes."""

    ids: np.ndarray
    scored: np.ndarray
    document: np.ndarray


class _Shard(NamedTuple):
    file: Path
    opened: safe_open
    rows: int
    length: int
    spellings: dict[int, str]


class Corpus:
    """The shards of a folder, in the order of their names, as one table of rows."""

    def __init__(self, folder: str | Path, *, vocab_size: int, tokenizer: tokenizers.Tokenizer | None = None) -> None:
        """Opens every shard and reads its header. Raises FileNotFoundError without the folder, and ValueError where it
        holds no shard, or naming a bad one, such as one whose tokens `tokenizer` spells otherwise."""
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"{folder} is no directory; make a corpus there with: twotower tokenize, or twotower sample"
            )
        files = _files(folder)
        if not files:
            raise ValueError(
                f"{folder} holds no .safetensors shard; make some with: twotower tokenize, or twotower sample"
            )
        self._shards = [_open(file) for file in files]
        if tokenizer is not None:
            for shard in self._shards:
                _check_spellings(shard, tokenizer)
        lengths = {shard.length for shard in self._shards}
        if len(lengths) > 1:
            raise ValueError(f"{folder} has rows of {sorted(lengths)} tokens, must all be of one length; make it again")
        self.length = lengths.pop()
        self._ends = np.cumsum([shard.rows for shard in self._shards])
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        """The number of rows in all shards."""
        return int(self._ends[-1])

    def batch(self, samples: range, seed: int) -> CorpusBatch:
        """The rows with the numbers `samples` of an endless run over the corpus.

        Each epoch visits every row once, in an order that depends on (seed, epoch) alone, so that a run can resume from
        the number of the next row. Raises ValueError where a shard has tokens outside the vocabulary.
        """
        orders = {epoch: _order(seed, epoch, len(self)) for epoch in {sample // len(self) for sample in samples}}
        rows = [self.row(int(orders[sample // len(self)][sample % len(self)])) for sample in samples]
        ids, scored, document = (torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True))
        return CorpusBatch(ids.long(), scored, document.long(), torch.tensor(samples))

    def row(self, index: int) -> CorpusRows:
        """The arrays (t,) of row `index` of the table. Raises ValueError for tokens outside the vocabulary."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[place]
        at = index - (int(self._ends[place - 1]) if place else 0)
        found = CorpusRows(*(shard.opened.get_slice(name)[at : at + 1][0] for name in CorpusRows._fields))
        self._check_ids(shard, found)
        return found

    def shards(self) -> Iterator[CorpusRows]:
        """The arrays (r, t) of every shard. Raises ValueError for tokens outside the vocabulary."""
        for shard in self._shards:
            found = CorpusRows(*(shard.opened.get_tensor(name) for name in CorpusRows._fields))
            self._check_ids(shard, found)
            yield found

    def _check_ids(self, shard: _Shard, found: CorpusRows) -> None:
        if found.ids.min() < 0 or found.ids.max() >= self._vocab_size:
            raise ValueError(f"{shard.file} has ids outside [0, {self._vocab_size}); make it with this checkpoint")


def is_corpus(source: str | Path) -> bool:
    """Whether `source` is a folder that holds shards."""
    return bool(_files(source))


def _files(folder: str | Path) -> list[Path]:
    return sorted(f for f in Path(folder).glob("*.safetensors") if ".partial" not in f.name)


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def write_shard(file: Path, rows: CorpusRows, tokenizer: tokenizers.Tokenizer | None = None) -> None:
    """Writes a shard, in the stored dtypes, of tokens of `tokenizer`. It is renamed when complete, so that a kill
    leaves no incomplete `file`."""
    # safetensors ignores strides and writes an array's memory as it lies.
    ids = np.ascontiguousarray(rows.ids, dtype=np.int32)
    scored = np.ascontiguousarray(rows.scored, dtype=np.bool_)
    document = np.ascontiguousarray(rows.document, dtype=np.int32)
    assert ids.shape == scored.shape == document.shape
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.safetensors")
    metadata = None if tokenizer is None else {_VOCABULARY: json.dumps(spellings(tokenizer))}
    save_file({"ids": ids, "scored": scored, "document": document}, partial, metadata)
    os.replace(partial, file)


def _open(file: Path) -> _Shard:
    try:
        opened = safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole .safetensors file ({error}); make it again") from error
    if set(opened.keys()) != set(_DTYPES):
        raise ValueError(f"{file} holds {sorted(opened.keys())}, must hold {sorted(_DTYPES)}; make it again")
    slices = {name: opened.get_slice(name) for name in _DTYPES}
    shapes = {tuple(part.get_shape()) for part in slices.values()}
    (r, t) = shape = next(iter(shapes)) if len(shapes) == 1 else (0, 0)
    if r == 0 or t == 0 or len(shape) != 2:
        raise ValueError(f"{file} has shapes {sorted(shapes)}, must be (rows, tokens), one for all; make it again")
    wrong = {name: part.get_dtype() for name, part in slices.items() if part.get_dtype() != _DTYPES[name]}
    if wrong:
        raise ValueError(f"{file} holds {wrong}, must hold {_DTYPES}; make it again")
    return _Shard(file, opened, r, t, _spellings(file, opened))


def _spellings(file: Path, opened: safe_open) -> dict[int, str]:
    text = (opened.metadata() or {}).get(_VOCABULARY, "{}")
    try:
        return {int(i): str(name) for i, name in json.loads(text).items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{file} has a {_VOCABULARY} that can't be read ({error}); make it again") from error


def _check_spellings(shard: _Shard, tokenizer: tokenizers.Tokenizer) -> None:
    found = difference(shard.spellings, tokenizer)
    if found is not None:
        here = "no token" if found.found is None else repr(found.found)
        raise ValueError(
            f"{shard.file} was made with another vocabulary than this checkpoint's: token {found.token_id} is "
            f"{found.held!r} there and {here} here; make the corpus again with this checkpoint, or give the checkpoint "
            "that it was made with"
        )
