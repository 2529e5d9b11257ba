"""Writing a corpus: from documents to shards of packed rows."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twotower.checkpoints.families.nemotron_h import read_one_tower_config
from twotower.checkpoints.hf.hub import resolve
from twotower.checkpoints.hf.tokenizer_file import load_tokenizer
from twotower.training.corpus.packing import Packed, pack
from twotower.training.corpus.shards import CorpusRows, write_shard
from twotower.training.corpus.text import TextConfig, read_documents

# The number of rows in a shard.
ROWS = 4096


class CorpusCounts(NamedTuple):
    """The size of a corpus: its rows, scored tokens, padding tokens, the documents that were longer than a row, and the
    tokens that were cut off them."""

    rows: int
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
    """Writes the documents of `source`, as `read_documents` finds them, into shards of `rows` rows, with the tokenizer
    of the checkpoint `model`. `progress` is called after each shard with the number of rows written so far.

    `out` stays empty until all shards are written. Raises FileExistsError unless `out` is new or empty, and ValueError
    for a checkpoint without a tokenizer or a source without text.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose a new directory")
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer.json to tokenize with; add one")
    packed = pack(read_documents(source, config), tokenizer, read_one_tower_config(folder), config)
    place = out.resolve()  # absolute, because the path "." has neither name nor parent
    place.parent.mkdir(parents=True, exist_ok=True)
    # An incomplete corpus could be trained on unnoticed, so the shards are moved to `out` when all are written.
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.partial-", dir=place.parent) as building:
        counts = _write(packed, rows, Path(building), progress)
        if not counts.rows:
            raise ValueError(f"{source} has no text to make tokens of; give another, or another --text-field")
        place.mkdir(exist_ok=True)
        for file in sorted(Path(building).iterdir()):
            shutil.move(file, place)
    return counts


def _write(packed: Iterator[Packed], size: int, folder: Path, progress: Callable[[int], None]) -> CorpusCounts:
    counts = CorpusCounts(0, 0, 0, 0, 0)
    for index, shard in enumerate(iter(lambda: list(itertools.islice(packed, size)), [])):
        stacked = CorpusRows(*(np.stack(parts) for parts in zip(*(p.row for p in shard), strict=True)))
        write_shard(folder / f"{index:05d}.safetensors", stacked)
        counts = CorpusCounts(
            counts.rows + len(shard),
            counts.scored + int(stacked.scored.sum()),
            counts.padding + sum(p.num_padding for p in shard),
            counts.cut + sum(p.num_lost > 0 for p in shard),
            counts.lost + sum(p.num_lost for p in shard),
        )
        progress(counts.rows)
    return counts
