"""Writing a corpus: from documents to shards of packed rows."""

import glob
import itertools
import operator
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from twotower.checkpoints.families.nemotron_h import read_one_tower_config
from twotower.checkpoints.hf.config_file import read_raw_config
from twotower.checkpoints.hf.generation_file import read_config
from twotower.checkpoints.hf.hub import resolve
from twotower.checkpoints.hf.tokenizer_file import load_tokenizer
from twotower.config import TwoTowerConfig
from twotower.training.corpus.packing import Packed, pack
from twotower.training.corpus.shards import CorpusRows, write_shard
from twotower.training.corpus.text import TextConfig, read_documents

_TWO_TOWERS = "NemotronHTwoTowerForCausalLM"
# The most rows of a shard, and the most tokens: a shard is in memory while it is filled.
ROWS = 4096
SHARD_TOKENS = 1 << 22


class CorpusCounts(NamedTuple):
    """The size of a corpus: its rows and their tokens, of these the scored and the padding, the documents that were
    longer than a row, and the tokens that were cut off them."""

    rows: int
    tokens: int
    scored: int
    padding: int
    cut: int
    lost: int


def write_corpus(
    model: str,
    source: str,
    out: Path,
    config: TextConfig,
    rows: int = ROWS,
    progress: Callable[[int], None] = lambda written: None,
) -> CorpusCounts:
    """Writes the documents of `source`, as `read_documents` finds them, into shards of at most `rows` rows and
    SHARD_TOKENS tokens, with the tokenizer of the checkpoint `model`. `progress` is called after each shard with the
    number of rows written so far. Memory doesn't grow with `source`, nor with a document of it.

    `out` stays absent or empty until all shards are written. Raises FileExistsError unless `out` is new or empty,
    SettingError for rows longer than the model's positions unless `config.past_positions`, and ValueError for a
    checkpoint without a tokenizer or a source without text.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose a new directory")
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer.json to tokenize with; add one")
    shapes = _config(folder)
    length = config.row_length(shapes)
    packed = pack(read_documents(source, config, folder), tokenizer, shapes, config)
    place = out.resolve()  # absolute, because the path "." has neither name nor parent
    place.parent.mkdir(parents=True, exist_ok=True)
    size = max(1, min(rows, SHARD_TOKENS // length))
    for left in place.parent.glob(f"{glob.escape(place.name)}.partial-*"):
        warnings.warn(f"{left} is left of a call that was killed; delete it unless that call still runs", stacklevel=2)
    # An incomplete corpus could be trained on unnoticed, so the shards are moved to `out` when all are written.
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.partial-", dir=place.parent) as building:
        (whole := Path(building) / place.name).mkdir()
        counts = _write(packed, length, size, whole, tokenizer, progress)
        if not counts.rows:
            raise ValueError(f"{source} has no text to make tokens of; give another, or another --text-field")
        if place.exists():  # it may be somebody's current folder, and stays the same one
            for file in sorted(whole.iterdir()):
                shutil.move(file, place)
        else:
            os.rename(whole, place)
    return counts


def _config(folder: Path) -> TwoTowerConfig:
    """The config of a two-tower checkpoint, or of a model to be pretrained."""
    architectures = read_raw_config(folder).get("architectures") or ()
    return read_config(folder) if _TWO_TOWERS in architectures else read_one_tower_config(folder)


def _write(
    packed: Iterator[Packed],
    length: int,
    size: int,
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    progress: Callable[[int], None],
) -> CorpusCounts:
    counts = CorpusCounts(0, 0, 0, 0, 0, 0)
    shard = CorpusRows(*(np.empty((size, length), dtype) for dtype in (np.int32, np.bool_, np.int32)))
    index = 0
    while True:
        num_rows = num_padding = num_cut = num_lost = 0
        for found in itertools.islice(packed, size):
            for whole, part in zip(shard, found.row, strict=True):
                whole[num_rows] = part
            num_rows += 1
            num_padding += found.num_padding
            num_cut += found.num_lost > 0
            num_lost += found.num_lost
        if num_rows == 0:
            return counts
        filled = CorpusRows(*(whole[:num_rows] for whole in shard))
        write_shard(folder / f"{index:05d}.safetensors", filled, tokenizer)
        more = CorpusCounts(num_rows, num_rows * length, int(filled.scored.sum()), num_padding, num_cut, num_lost)
        counts = CorpusCounts(*map(operator.add, counts, more))
        progress(counts.rows)
        index += 1
