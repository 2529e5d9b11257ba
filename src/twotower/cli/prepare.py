"""What `train` starts from: a two-tower checkpoint and corpora of tokens, made first where it is given less."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from twotower.checkpoints.backbone import init_two_tower, open_backbone
from twotower.checkpoints.hf import holds_two_towers, read_config, resolve
from twotower.cli.tokenize import write_corpus
from twotower.config import TwoTowerConfig
from twotower.training.data import is_corpus
from twotower.training.text import TextConfig

# What was made of what; written last.
_RECORD = "prepared.json"
_SECONDS_BETWEEN_LOOKS = 0.2


class Prepared(NamedTuple):
    """A two-tower checkpoint, and the folder of shards of each corpus by its name."""

    model: str
    corpora: dict[str, Path]


def prepare(model: str, sources: Mapping[str, str], out: Path, row_length: int | None) -> Prepared:
    """Makes `out`/initial of a `model` that is a single tower, and `out`/NAME of every source that is text.

    A source is a folder of shards, or anything that `read_documents` reads. What an earlier call made is taken as it
    is. Under torchrun rank 0 makes them and the others wait. Raises ValueError where `out` has them of something else.
    """
    towers = model if holds_two_towers(model) else str(out / "initial")
    corpora = {name: Path(source) if is_corpus(source) else out / name for name, source in sources.items()}
    texts = {name: source for name, source in sources.items() if not is_corpus(source)}
    if towers == model and not texts:
        return Prepared(model, corpora)
    config = TextConfig() if row_length is None else TextConfig(length=row_length)
    record = {"model": str(model), **texts} | ({"row_length": config.length} if texts else {})
    made = _read(out)
    if int(os.environ.get("RANK", "0")):
        while made is None:  # rank 0 looks whether it is the same
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            made = _read(out)
    elif made is None:
        if towers != model:
            init_two_tower(model, Path(towers))
            print(f"{towers} holds two towers made of {model}")
        for name, source in texts.items():
            write_corpus(towers, source, corpora[name], config)
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f"{_RECORD}.partial"
        partial.write_text(json.dumps(record), encoding="utf-8")
        os.replace(partial, out / _RECORD)
    elif not record.items() <= made.items():
        raise ValueError(f"{out} was begun with {made}, not with {record}; give the same again, or another OUT")
    return Prepared(towers, corpora)


def towers_config(model: str) -> TwoTowerConfig:
    """What the towers of `prepare` would have; of a two-tower checkpoint the weights needn't be there."""
    try:
        single = not holds_two_towers(model)
    except FileNotFoundError:
        single = False
    return open_backbone(model).config if single else read_config(resolve(model))


def _read(out: Path) -> dict[str, object] | None:
    file = out / _RECORD
    found: dict[str, object] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return found
